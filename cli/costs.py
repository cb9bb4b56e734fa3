"""What a known base will take for the pairs at hand; nothing is loaded, no network is asked."""

from typing import TYPE_CHECKING, Any

from fewshot_rt.cards import Card
from fewshot_rt.costs import (
    GB,
    GPU,
    GPUS,
    TERA,
    UTILISATION,
    Video,
    measure_pass,
    open_on_meta,
    this_gpu,
)
from fewshot_rt.ladder import PASSES
from fewshot_rt.memory import Memory, measure_memory
from fewshot_rt.train_config import TrainConfig
from fewshot_rt.trial import MOST_TRIED

from .bases import describe, shorten
from .progress import say, show_table

if TYPE_CHECKING:
    from fewshot_rt.task import Task

VERBS = ("train", "predict", "offload")
TITLES = {"train": "train", "predict": "predict", "offload": "predict with --offload"}


def show_costs(card: Card, task: "Task", settings: TrainConfig) -> dict[str, Any]:
    """Tell what training and predicting will take; give the same as JSON values.

    Raises: ModelError if the base does not take the size or the number of frames.
    """
    base = open_on_meta(card)
    suited = settings.suited(base.suited)
    size = settings.pixels(base.geometry.native)
    video = Video(frames=task.transition.frames, size=size, batch=suited.batch)
    once = measure_pass(card, video)
    memory = measure_memory(
        card,
        video,
        rank=suited.rank,
        weights=settings.weights,
        checkpointing=suited.checkpointing,
    )
    update = suited.batch * once.training_flop(checkpointing=suited.checkpointing)
    here = this_gpu()
    costs = {
        "base": describe(card),
        "size": f"{size[1]}x{size[0]}",
        "frames": video.frames,
        "batch": suited.batch,
        "rank": suited.rank,
        "steps": settings.steps,
        "vae": settings.vae,
        "tokens": once.tokens,
        "pass_tflop": once.flop / TERA,
        "step_tflop": update / TERA,
        "utilisation": UTILISATION,
        "memory_gb": {verb: _in_gb(memory[verb]) for verb in VERBS},
        "has_gpu": here is not None,
        "gpus": [_judge(gpu, update, memory) for gpu in ([here] if here else GPUS)],
    }
    _show(costs)
    return costs


def _in_gb(memory: Memory) -> dict[str, float]:
    sizes = {**vars(memory), "total": memory.total}
    return {name: size / GB for name, size in sizes.items()}


def _judge(gpu: GPU, update: int, memory: dict[str, Memory]) -> dict[str, Any]:
    figures = {**vars(gpu), "step_seconds": gpu.seconds(update)}
    verdicts = {verb: gpu.holds(memory[verb].total) for verb in VERBS}
    return {k: None if v != v else v for k, v in figures.items()} | verdicts


def _show(costs: dict[str, Any]) -> None:
    base = costs["base"]
    parameters = shorten(base["transformer_parameters"])
    place = "on this machine" if base["is_here"] else "not on this machine"
    say(f"{base['name']}: {parameters} parameters, {base['licence']}, {place}")
    say(
        f"one prediction, {costs['frames']} frames of {costs['size']}: {costs['tokens']} tokens, "
        f"{costs['pass_tflop']:.3g} TFLOP"
    )
    for verb in VERBS:
        parts = dict(costs["memory_gb"][verb])
        total = parts.pop("total")
        listed = ", ".join(f"{name} {size:.1f}" for name, size in parts.items() if size)
        say(f"memory to {TITLES[verb]}: {total:.1f} GB ({listed})")
    columns = ["GPU", "memory GB", "s/step", f"{costs['steps']} steps", "trains", "predicts"]
    show_table(columns, [_row(gpu, costs["steps"]) for gpu in costs["gpus"]])
    say(
        "These are estimates, of memory for encoding and decoding (coding) one video at a time; "
        f"times are at {costs['utilisation']:.0%} of a GPU's peak in bf16, in batches of "
        f"{costs['batch']}."
    )
    say(
        f"At its end training tries how few steps are enough: {PASSES} predictions of each of up "
        f"to {MOST_TRIED} images; --hold-out 0 leaves it out where there are no test pairs."
    )
    if costs["vae"]:
        say("coding is that of the base's own autoencoder; with --vae it takes far less.")
    say(_verdict(costs))


def _row(gpu: dict[str, Any], steps: int) -> list[str]:
    predicts = "yes" if gpu["predict"] else "--offload" if gpu["offload"] else "no"
    verdicts = ("yes" if gpu["train"] else "no", predicts)
    return [gpu["name"], f"{gpu['memory_gb']:.0f}", *_times(gpu["step_seconds"], steps), *verdicts]


def _times(step_seconds: float | None, steps: int) -> tuple[str, str]:
    if step_seconds is None:  # the GPU's peak is not known here
        return "?", "?"
    seconds = step_seconds * steps
    whole = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
    return f"{step_seconds:.2g}", whole


def _verdict(costs: dict[str, Any]) -> str:
    if not costs["has_gpu"]:
        return "This machine has no GPU. pocket trains without one."
    gpu = costs["gpus"][0]
    if gpu["train"] and gpu["predict"]:
        return "This GPU will do."
    if gpu["train"] and gpu["offload"]:
        return "This GPU will do: train as usual, and predict with --offload."
    if gpu["train"]:
        return "This GPU will train, but not predict, which takes the base in bf16."
    return (
        "This GPU will not do: take a smaller --size or --base, --weights nf4, a tiny --vae, or a "
        "GPU with more memory."
    )
