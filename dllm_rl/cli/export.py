"""dllm-rl export: a trained model as a folder that others can load, and on the hub."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError

from dllm_rl.cli.output import write_json
from dllm_rl.driver.export import export_model
from dllm_rl.errors import RunStopped, UserError, first_line


def run_export(source: str, out: Path, *, merge: bool, push_to_hub: str | None, json_path: Path | None) -> None:
    """Export, say what was proved, and upload if asked.

    Args:
        source: see export_model.
        out: new folder.
        merge: add the adapter to its base.
        push_to_hub: repository of the hub; made, private, if it is new.
        json_path: where the figures go.
    Raises:
        UserError: see export_model; a name that the hub does not take.
        RunStopped: the proof fails, or the upload does; the folder is complete then.
    """
    if push_to_hub is not None:  # a typing error is known here, not after minutes
        try:
            huggingface_hub.utils.validate_repo_id(push_to_hub)
        except HFValidationError as error:
            raise UserError(f"--push-to-hub {push_to_hub}: {first_line(error)}; write owner/name") from None
    command = shlex.join(["dllm-rl", "export", source, *(["--merge"] if merge else []), str(out)])
    done = export_model(source, out, merge=merge, command=command)
    what = "adapted layers" if done.kind == "adapter" else "tensors"
    print(
        f"{done.changed} of {done.tensors} {what} differ from the base {done.base}; logits move by up to "
        f"{done.effect:.2e} of the largest one and are within {done.error:.2e} of the checkpoint's ({done.dtype})"
    )
    if done.effect <= done.error:
        print(f"that is less than rounding in {done.dtype} costs: this export can hardly be told from its base")
    print(f"{done.kind} written to {out}")
    write_json(json_path, {**dataclasses.asdict(done), "folder": str(out), "hub": push_to_hub})
    if push_to_hub is not None:
        print(f"uploaded to {_push(out, push_to_hub)}")


def _push(folder: Path, name: str) -> str:
    hub = huggingface_hub.HfApi()
    try:
        hub.create_repo(name, private=True, exist_ok=True)
        return str(hub.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload by dllm-rl export"))
    except (OSError, ValueError) as error:  # the hub's own errors, of tokens and of the network, are among them
        raise RunStopped(
            f"the export is in {folder}, but was not uploaded to '{name}' ({type(error).__name__}: "
            f"{first_line(error)}); log in with 'hf auth login', then: hf upload {name} {folder}"
        ) from error
