"""One of the fake SLURM tools: `tool.py FOLDER NAME ARGUMENT…`. Standard library only, it starts in 15 ms."""
from __future__ import annotations

import json
import os
import re
import sys
import time

SHORT = {"-O": "--Format", "-o": "--format", "-j": "--jobs", "-u": "--user", "-n": "--name"}
ISO = re.compile(r"\d{4}(-\d\d){2}T\d\d(:\d\d){2}")
ID_FIELDS = ("JobID", "JobIDRaw", "ArrayJobID", "JobArrayID")


def main(folder: str, tool: str, argv: list[str]) -> int:
    earlier = note(f"{folder}/calls", [tool, *argv])
    with open(f"{folder}/state.json") as file:
        state = json.load(file)
    told = state["say"].get(tool)
    if told:
        return speak(told[min(earlier.count(tool) - state["from"].get(tool, 0), len(told) - 1)])
    rows = state["rows"].get(tool, [])
    if tool == "squeue":
        return squeue(argv, rows, state["defaults"])
    if tool == "sacct":
        return sacct(argv, rows)
    if tool == "sbatch":
        return sbatch(argv, earlier.count("sbatch"), state["defaults"])
    return speak(state["defaults"]["sinfo.nodes"]) if tool == "sinfo" else 0


def note(path: str, call: list[str]) -> list[str]:
    """Append the call; the tools of all calls before."""
    with open(path) as file:
        earlier = [json.loads(line)[0] for line in file]
    with open(path, "a") as file:
        file.write(json.dumps(call) + "\n")
    return earlier


def speak(answer: dict[str, object]) -> int:
    time.sleep(float(str(answer["hang_s"])))
    sys.stdout.write(str(answer["stdout"]))
    sys.stderr.write(str(answer["stderr"]))
    return int(str(answer["code"]))


def options(argv: list[str]) -> dict[str, str]:
    """The values of the options that choose jobs and columns, by their long names."""
    found, words = {}, iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if equals and name in SHORT.values():
            found[name] = value
        elif word in SHORT or word in SHORT.values():
            if word != "-n" or sys.argv[2] == "squeue":  # sacct's -n has no value
                found[SHORT.get(word, word)] = next(words)
        elif word[:2] in SHORT and word[:2] != "-n" and not word.startswith("--"):
            found[SHORT[word[:2]]] = word[2:]
    return found


def chosen(asked: dict[str, str], rows: list[dict[str, str]], user: str, name: str) -> list[dict[str, str]]:
    wanted = {"--jobs": ID_FIELDS, "--user": (user,), "--name": (name,)}
    for option, fields in wanted.items():
        if option in asked:
            values = set(asked[option].split(","))
            rows = [row for row in rows if values & {row.get(field) for field in fields}]
    return rows


def squeue(argv: list[str], rows: list[dict[str, str]], defaults: dict[str, dict[str, object]]) -> int:
    asked = options(argv)
    found = chosen(asked, rows, "UserName", "Name")
    if "--jobs" in asked and "," not in asked["--jobs"] and not found:
        return speak(defaults["squeue.unknown-id"])
    if "--Format" not in asked:
        sys.exit("the fake squeue needs -O")
    columns = [one.rpartition(":") if one.count(":") > 1 else one.partition(":")
               for one in asked["--Format"].split(",")]
    for row in found:
        print("".join(value(row, field) + separator for field, _, separator in columns))
    return 0


def sacct(argv: list[str], rows: list[dict[str, str]]) -> int:
    asked = options(argv)
    for row in chosen(asked, rows, "User", "JobName"):
        print("|".join(value(row, field) for field in asked["--format"].split(",")))
    return 0


def value(row: dict[str, str], field: str) -> str:
    known = {name.lower(): name for name in row}
    if field.lower() not in known:
        print(f"{sys.argv[2]}: error: Invalid field requested: \"{field}\"", file=sys.stderr)
        sys.exit(1)
    text = row[known[field.lower()]]
    if os.environ.get("SLURM_TIME_FORMAT") == "%s" and ISO.fullmatch(text):
        return str(int(time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))))
    return text


def sbatch(argv: list[str], submitted: int, defaults: dict[str, dict[str, object]]) -> int:
    if "--test-only" in argv:
        return speak(defaults["test-only.possible"])
    print(("" if "--parsable" in argv else "Submitted batch job ") + str(101 + submitted))
    return 0


if __name__ == "__main__":
    try:
        status = main(sys.argv[1], sys.argv[2], sys.argv[3:])
        sys.stdout.flush()
    except BrokenPipeError:
        status = 1
    os._exit(status)
