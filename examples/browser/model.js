// A model in one file, from the pixels of an image to the pixels of its answer.

import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";

// In a worker of its own, so that the page stays alive meanwhile.
ort.env.wasm.proxy = true;
ort.env.logLevel = "error";

const METADATA_FIELD = 14; // ModelProto.metadata_props in onnx.proto

/** Opens a model from the bytes of its file. Throws an Error with what to do if it is none of ours. */
export async function openModel(bytes) {
  const properties = readProperties(bytes);
  if (!properties.has("fewshot-rt")) throw new Error("it was not made by fewshot-rt.");
  const role = properties.get("role");
  if (role !== "answer") throw new Error(`it is one part of a bundle (${role}), not the whole.`);
  const session = await ort.InferenceSession.create(bytes);
  return {
    properties,
    answer: (image) => answer(session, image),
    close: () => session.release(),
  };
}

/** Answers an ImageData; gives the answer as one of the same size, and the milliseconds it took. */
async function answer(session, { data, width, height }) {
  const pixels = new Uint8Array(width * height * 3);
  for (let i = 0, j = 0; i < data.length; i += 4) {
    pixels[j++] = data[i];
    pixels[j++] = data[i + 1];
    pixels[j++] = data[i + 2];
  }
  const image = new ort.Tensor("uint8", pixels, [1, height, width, 3]);
  const started = performance.now();
  const results = await session.run({ image });
  const milliseconds = performance.now() - started;
  const answered = results.answer.data;
  const shown = new ImageData(width, height);
  for (let i = 0, j = 0; j < answered.length; i += 4) {
    shown.data[i] = answered[j++];
    shown.data[i + 1] = answered[j++];
    shown.data[i + 2] = answered[j++];
    shown.data[i + 3] = 255;
  }
  return { shown, milliseconds };
}

/** Reads the properties of an ONNX file, which onnxruntime-web keeps to itself. */
export function readProperties(bytes) {
  const text = new TextDecoder();
  const properties = new Map();
  for (const [field, value] of readFields(bytes)) {
    if (field !== METADATA_FIELD) continue;
    const pair = new Map(readFields(value));
    properties.set(text.decode(pair.get(1)), text.decode(pair.get(2)));
  }
  return properties;
}

/** Lists the texts and messages in a protobuf message, by the numbers of their fields. */
function* readFields(bytes) {
  let at = 0;
  function readNumber() {
    let number = 0;
    for (let scale = 1; at < bytes.length; scale *= 128) {
      const byte = bytes[at++];
      number += (byte & 127) * scale;
      if (byte < 128) return number;
    }
    throw new Error("it is no ONNX file, or only the beginning of one.");
  }
  while (at < bytes.length) {
    const tag = readNumber();
    const [field, kind] = [Math.floor(tag / 8), tag % 8];
    const size = readNumber(); // of what follows, or the number itself
    if (kind === 0) continue;
    if (kind !== 2 || at + size > bytes.length) {
      throw new Error("it is no ONNX file, or only the beginning of one.");
    }
    yield [field, bytes.subarray(at, at + size)];
    at += size;
  }
}
