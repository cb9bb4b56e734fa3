// What is on the page: files come in, cards with an image and its answer appear.

const [status, task, about, answers, card] = ["status", "task", "about", "answers", "card"].map(
  (id) => document.getElementById(id),
);
let model = null;
let work = Promise.resolve(); // one file after the other, in the order in which they were given

/** Takes files of either kind, models first. */
function take(files) {
  const [models, images] = [[], []];
  for (const file of files) (file.name.endsWith(".onnx") ? models : images).push(file);
  for (const file of models) queue(() => useModel(file.name, file));
  const cards = images.map((file) => addCard(file.name));
  answers.prepend(...cards);
  images.forEach((file, index) => queue(() => fillCard(cards[index], file)));
}

function queue(step) {
  document.body.ariaBusy = "true";
  const mine = work.then(step);
  work = mine;
  mine.then(() => {
    if (work === mine) document.body.ariaBusy = "false";
  });
}

/** Says something in a place on the page; what went wrong stands out. */
function say(place, text, { isWrong = false } = {}) {
  place.textContent = text;
  (place.closest("article") ?? place).classList.toggle("is-wrong", isWrong);
}

async function useModel(name, file) {
  say(status, `Opening ${name} …`);
  try {
    const { openModel } = await loadRuntime();
    const opened = await openModel(new Uint8Array(await file.arrayBuffer()));
    await model?.close();
    model = opened;
  } catch (error) {
    return say(status, `${name} cannot be used: ${error.message}`, { isWrong: true });
  }
  const known = (key) => model.properties.get(key) ?? "unknown";
  task.textContent = known("task");
  about.textContent = [
    known("codec"),
    `base ${known("base")} (${known("licence")})`,
    `sees ${known("width")}x${known("height")} pixels`,
    `${(file.size / 1e6).toFixed(1)} MB`,
  ].join(" · ");
  say(status, "Ready.");
}

async function loadRuntime() {
  try {
    return await import("./model.js");
  } catch {
    throw new Error("onnxruntime-web is not there. Run npm install in this folder.");
  }
}

function addCard(name) {
  const added = card.content.firstElementChild.cloneNode(true);
  added.querySelector(".name").textContent = name;
  return added;
}

async function fillCard(filled, file) {
  const find = (part) => filled.querySelector(part);
  try {
    if (!model) throw new Error("there is no model yet. Choose one, then give the image again.");
    const image = await readImage(file);
    paint(find(".image"), image, `image ${file.name}`);
    say(find(".note"), "is being answered …");
    const { shown, milliseconds } = await model.answer(image);
    paint(find(".answer"), shown, `answer to ${file.name}`);
    await offer(find(".download"), find(".answer"), file.name);
    say(find(".note"), `${image.width}x${image.height}, ${milliseconds.toFixed(0)} ms`);
  } catch (error) {
    say(find(".note"), `No answer: ${error.message}`, { isWrong: true });
  }
}

/** Reads the pixels of an image file, upright; what is transparent lies on white. */
async function readImage(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error("this is no image that the browser can read.");
  }
  const context = sized(document.createElement("canvas"), bitmap);
  context.fillStyle = "white";
  context.fillRect(0, 0, bitmap.width, bitmap.height);
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, bitmap.width, bitmap.height);
}

function paint(canvas, pixels, label) {
  sized(canvas, pixels).putImageData(pixels, 0, 0);
  canvas.ariaLabel = label;
}

function sized(canvas, { width, height }) {
  Object.assign(canvas, { width, height });
  return canvas.getContext("2d", { willReadFrequently: true });
}

/** Lets a link download what a canvas shows. */
async function offer(link, canvas, name) {
  const file = await new Promise((done) => canvas.toBlob(done, "image/png"));
  link.href = URL.createObjectURL(file);
  link.download = `${name.replace(/\.[^.]*$/, "")}-answer.png`;
  link.ariaLabel = `Download the answer to ${name}`;
  link.hidden = false;
}

for (const id of ["model", "images"]) {
  const input = document.getElementById(id);
  input.addEventListener("change", () => {
    take(input.files);
    input.value = ""; // so that the same file can be chosen again
  });
}
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.toggle("is-over", kind === "dragover");
    if (kind === "drop") take(event.dataTransfer.files);
  });
}

// A model that lies beside the page is taken at once.
queue(async () => {
  const beside = await fetch("model.onnx").catch(() => null);
  if (beside?.ok) await useModel("model.onnx", await beside.blob());
});
