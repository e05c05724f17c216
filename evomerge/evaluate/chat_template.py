"""A chat template comes with a model and is a program: it is tried within bounds before the real prompts are rendered.

Run as a script, this file renders the template on its standard input and prints how long the text is.
"""

import json
import re
import subprocess
import sys

SECONDS = 10  # of processor time
MEMORY = 2 << 30  # bytes of address space
CHARACTERS = 1 << 20  # of the rendered text; templates add some hundreds to their messages
CHAT = [
    {"role": "user", "content": "What is 17 + 25?"},
    {"role": "assistant", "content": "42"},
    {"role": "user", "content": "And one more?"},
]


def problem_of(template: str, seconds: int = SECONDS) -> str | None:
    """What is wrong with a chat template that takes too long, too much memory, or makes too long a text; else None.

    It renders one short chat in a process of its own.  That it refuses this chat is no problem.

    seconds: of processor time.
    """
    command = [sys.executable, "-I", __file__, str(seconds)]
    try:
        done = subprocess.run(command, input=template, capture_output=True, text=True, timeout=9 * seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"takes longer than {seconds} s"
    if done.returncode < 0:
        return f"takes longer than {seconds} s"
    if "MemoryError" in done.stderr:
        return f"needs more than {MEMORY >> 30} GB of memory"
    length = int(done.stdout) if done.returncode == 0 else 0
    return f"makes a text of {length:,} characters" if length > CHARACTERS else None


def main() -> None:
    """Render the template on standard input, in at most so much processor time as the first argument says."""
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    seconds = int(sys.argv[1])
    if sys.platform != "win32":  # which has no such limits; the caller's limit of time is left there
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    source = re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", sys.stdin.read())  # a tag of transformers
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = json.dumps
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: form}
    given = {"messages": CHAT, "bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    print(len(environment.from_string(source).render(given)))


def refuse(message: str) -> None:
    """What a template calls when it does not like a chat."""
    raise ValueError(message)


if __name__ == "__main__":
    main()
