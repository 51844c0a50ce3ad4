"""The page: trials by kind of fault, fuzzers by what they damage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.core.text import plural
from harness.report.markup import escape, table
from studies import pages
from studies.reliability import fuzz
from studies.reliability.scene import SETTLE_SECONDS

CAMPAIGN = """\
A session of the tiny model (reference and `absmax-int8`, perplexity and memory) is disturbed at a drawn moment, left to
end, and resumed undisturbed. Then these must hold:

- every planned case has a figure or is `missing` with a reason, in the disturbed session too, unless it was killed or
  refused in one line before it measured, or said that its disk is full;
- every figure equals the undisturbed session's (load and run peaks and times aside);
- `--resume` brings every figure and measures none again that was finished, unless what it rests on was damaged;
- no session hangs (400 s; undisturbed {seconds} s), prints a traceback, or leaves a process, a held lock or a temporary
  file behind (a killed controller's or worker's log in the system's temporary folder excepted); the baselines can be
  read.

The user's part is done before `--resume`: room is made on a full disk, a damaged baseline, an overwritten text and
overwritten weights are brought back. *Measured* and *missing* count the rows of the disturbed sessions; a killed one
has fewer. Disks are small file systems of their own (`mount -t tmpfs`, which needs root; without it those trials are
not possible, and counted as such). Ray's trials need Ray (`pip install ray`): a worker of a Ray that the session
started is killed, or every process of one of two nodes of a cluster at once."""
LATER = """\
The same for kinds that joined later: a process is stopped (`SIGSTOP`), so that it answers nothing and does not end, and
the session is told to wait a minute (`--progress-timeout 1`); a compiled loop of the cache is damaged; and two sessions
record into the same baselines at once, under another protocol each, of which nothing may be lost."""
SIGNALS = """\
`SIGINT`, `SIGTERM`, `SIGHUP` or `SIGKILL`, drawn, reaches the controller alone or every process of the session, drawn,
in one of four phases: while it starts, while it makes ready (a model is trained meanwhile), while it measures, and when
the last case is measured. The same must hold, and beside it: once a plan is written the first three leave a report in
which every planned case stands, and nothing outlives its controller by more than {settle} s. Before that a signal ends
the session as it ends any program."""
FUZZ = """\
Whatever a stranger's file or name holds, it is read, or refused in one line that is harmless in a terminal: no other
exception, no hang (20 s a call), no more than 600 MiB beside what the process had, no path outside the named folder,
nothing unpickled and no code run without its option. Bytes are flipped, cut, doubled and put in, numbers replaced by
extreme ones, tables altered in any place (hypothesis); known traps (nested lists, unfolding aliases, archives that
unpack to gigabytes, links, pickles, code) stand beside. The short profile runs with the tests; this is {scale} times as
many examples (`tox run -e fuzz`)."""

GUIDED = """\
The readers of bytes once more, under atheris (libFuzzer), which keeps the inputs that reach new code and changes those:
20 s and 2 GiB a call, inputs of up to 16 KiB."""


def render(results: Mapping[str, Any]) -> str:
    """Below the heading."""
    parts = []
    if "campaign" in results:
        found = results["campaign"]["found"]
        told = CAMPAIGN.format(seconds=found["undisturbed"])
        parts += ["## Faults", told, *campaign("campaign", "fault", found, results["campaign"]["world"])]
    if "later" in results:
        parts += ["## Hangs, loops, two recorders", LATER]
        parts += campaign("later", "fault", results["later"]["found"], results["later"]["world"])
    if "signals" in results:
        parts += ["## Signals in every phase", SIGNALS.format(settle=SETTLE_SECONDS)]
        parts += campaign("signals", "phase and engine", results["signals"]["found"], results["signals"]["world"])
    if "fuzz" in results:
        made, found = results["fuzz"]["world"], results["fuzz"]["found"]
        heads = ["what is fuzzed", "tests", "examples", "seconds", "failed"]
        parts += ["## Hostile input", FUZZ.format(scale=found["scale"]), table(heads, fuzz.rows(found), words=(0,))]
        parts.append(
            f"Measured on {made['date']} in {made['minutes']} minutes on {pages.machine(made)} (`--parts fuzz`)."
        )
    if "guided" in results:
        made, found = results["guided"]["world"], results["guided"]["found"]
        rows = [[name, f"{one['executions']:,}", "yes" if one["crashed"] else "no"] for name, one in found.items()]
        parts += ["## Guided by coverage", GUIDED, table(["reader", "inputs", "crashed"], rows, words=(0,))]
        parts.append(
            f"Measured on {made['date']} in {made['minutes']} minutes on {pages.machine(made)} (`--parts guided`)."
        )
    return "\n\n".join(parts)


def campaign(part: str, kind: str, found: Mapping[str, Any], made: Mapping[str, Any]) -> list[str]:
    """What came of a series of trials: the sum, a line a kind, and what did not hold."""
    trials = [trial for trial in found["trials"] if trial["possible"]]
    wrong = [trial for trial in trials if trial["wrong"]]
    unable = [trial for trial in found["trials"] if not trial["possible"]]
    left = found["planned"] - len(found["trials"])
    rows = []
    for name in dict.fromkeys(trial["fault"] for trial in sorted(found["trials"], key=lambda trial: trial["fault"])):
        mine = [trial for trial in trials if trial["fault"] == name]
        kept, lost = (sum(trial["first"].get(key, 0) for trial in mine) for key in ("measured", "missing"))
        hit = sum(not trial["note"].startswith("no ") for trial in mine)
        again, bad = sum(trial["repeated"] for trial in mine), sum(bool(trial["wrong"]) for trial in mine)
        rows.append([name, *map(str, (len(mine), hit, kept, lost, again, bad))])
    hours = sum(trial["seconds"] for trial in trials) / 3600
    outcome = (
        f"**{plural(len(trials), 'trial')} (seed {found['seed']}, {hours:.1f} hours of sessions): "
        f"{'all held' if not wrong else f'{len(wrong)} did not hold'}.**"
        + (f" The command makes {found['planned']}; {left} were not run yet, called again it goes on." if left else "")
    )
    heads = [kind, "trials", "hit something", "measured", "missing", "measured again", "did not hold"]
    parts = [outcome, table(heads, rows, words=(0,))]
    if unable:
        parts.append(f"{plural(len(unable), 'trial')} not possible on this machine: {escape(unable[0]['note'])}.")
    if wrong:
        parts.append("\n".join(f"- {escape(told(trial))}" for trial in wrong))
    parts.append(
        f"Measured until {made['date']}, at last on {pages.machine(made)} (`--parts {part}`, in one go or "
        "several: the minutes at the top are the last call's); each trial with its moment is in the data."
    )
    return parts


def told(trial: Mapping[str, Any]) -> str:
    """A trial that did not hold, in a line."""
    return (
        f"trial {trial['number']}, {trial['fault']} ({trial['note']}, {trial['moment']}): {'; '.join(trial['wrong'])}"
    )
