"""`fewshot-rt pretrain`: make a base like pocket."""

from pathlib import Path
from typing import Any

import click

from fewshot_rt.pretrain_config import PretrainConfig

from .options import FOLDER, json_option, make_settings, settings_options, write_result
from .progress import meter, say


@click.command("pretrain")
@click.argument("folder", type=FOLDER, required=False)
@click.option("--preview", type=FOLDER, help="Only write a GIF of the procedural world there.")
@settings_options(PretrainConfig)
@json_option
def command(
    folder: Path | None, preview: Path | None, config: Path | None, as_json: bool, **flags: Any
) -> None:
    """Pretrain a base on the procedural world, in FOLDER.

    Give the command again with the same FOLDER to go on, with more --minutes to go on for longer.
    At every checkpoint FOLDER is a base: fewshot-rt train PAIRS --base FOLDER.

    \b
    torchrun shares the batch among processes, one to a GPU or to a core:
    torchrun --standalone --nproc-per-node 2 --local-ranks-filter 0 \\
        --no-python fewshot-rt pretrain FOLDER
    """
    settings = make_settings(PretrainConfig, config, flags)
    if preview:
        from fewshot_rt.world.preview import write_preview

        write_preview(preview, seed=settings.seed)
        say(f"preview: {preview}")
        write_result({"preview": preview}, as_json=as_json)
        return
    if folder is None:
        raise click.UsageError("Missing argument 'FOLDER': where the base is made.")
    from fewshot_rt.pretrain import STAGES, pretrain

    steps: dict[str, int] = dict.fromkeys(STAGES, 0)
    loss = float("nan")
    with meter("pretrain") as shown:
        for step in pretrain(settings, folder):
            steps[step.stage] = step.step
            loss = step.loss if loss != loss else 0.98 * loss + 0.02 * step.loss
            note = f"{step.stage} {step.step}  loss {loss:.4f}  {step.clips_per_second:.0f} clips/s"
            shown.show(step.progress, note)
    say(f"base: {folder}\nnext  fewshot-rt train PAIRS --base {folder}")
    write_result({"base": folder, "steps": steps, "loss": loss}, as_json=as_json)
