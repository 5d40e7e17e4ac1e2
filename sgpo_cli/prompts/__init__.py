"""The words that are sent to models: text files beside this module, or files of the user's own.

One file, two readers: `improver.txt` makes the rows that train the improver and the messages it is asked
with, so training and generation cannot drift apart. Knows nothing of models or stages.
"""

import hashlib
from pathlib import Path

from sgpo_cli.artifacts import read_manifest
from sgpo_cli.errors import UsageError

Message = dict[str, str]
OWN = Path(__file__).parent


def load(name: str) -> str:
    """The text of a prompt: one of our own by name ("improver", "teacher"), or a file.

    Raises:
        UsageError: there is no such file, or it is empty or not UTF-8.
    """
    path = OWN / f"{name}.txt" if name.isidentifier() and (OWN / f"{name}.txt").exists() else Path(name)
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"prompt {name!r}: {error}", "name a UTF-8 text file") from None
    if not text:
        raise UsageError(f"prompt {name!r}: {path} is empty")
    return text


def improve(prompt: list[Message], response: str, request: str) -> list[Message]:
    """The improver's messages: the conversation, the answer, and the request to improve it.

    The prompt and the answer stay the turns they were, so both roles share a prefix, conversations need
    no special form, and text in an answer cannot pass for an instruction of ours.
    """
    return [*prompt, {"role": "assistant", "content": response}, {"role": "user", "content": request}]


def improver_request(model: str, given: str | None) -> str:
    """The request that a model was trained to answer as improver.

    Args:
        given: the user's own, by name or file; None for the model's.

    Raises:
        UsageError: the model was trained with another one.
    """
    manifest = read_manifest(Path(model)) or {}
    trained: str | None = manifest.get("improver_prompt")
    text = load(given) if given is not None else trained or load("improver")
    if trained is not None and text != trained:
        raise UsageError(
            f"{model} was trained with another improver prompt: {trained!r}, not {text!r}",
            "leave --improver-prompt out, or train the improver with the new one",
        )
    return text


def teach(instructions: str, prompt: list[Message], response: str, reference: str) -> list[Message]:
    """The teacher's messages: instructions, then the material between markers no text can forge."""
    material = {"request": as_text(prompt), "current answer": response, "reference answer": reference}
    closing = "Now print the improved version of the current answer, and nothing else."
    return [
        {"role": "system", "content": instructions},
        {"role": "user", "content": f"{_fenced(material, marker_of(material))}\n\n{closing}"},
    ]


def judge(instructions: str, material: dict[str, str]) -> list[Message]:
    """A judge's messages: instructions, then the material between markers no text can forge.

    Args:
        instructions: with `{marker}` where the judge is told how its verdict has to look; the same marker
            makes the fence, so a verdict that stands in the material is not one.
        material: name -> text, such as the request and the answers.
    """
    marker = marker_of(material)
    closing = "Now judge, and end with the verdict line that your instructions ask for."
    return [
        {"role": "system", "content": instructions.replace("{marker}", marker)},
        {"role": "user", "content": f"{_fenced(material, marker)}\n\n{closing}"},
    ]


def as_text(prompt: list[Message]) -> str:
    """A conversation as one text."""
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def marker_of(material: dict[str, str]) -> str:
    """A marker that occurs in none of the texts; drawn from them, so that the same row gives the same request."""
    text = "".join(material.values())
    marker = text
    while marker in text:
        marker = hashlib.sha256(marker.encode()).hexdigest()[:12]
    return marker


def _fenced(material: dict[str, str], marker: str) -> str:
    return "\n\n".join(f"[{marker} {name}]\n{text}\n[{marker} end]" for name, text in material.items())
