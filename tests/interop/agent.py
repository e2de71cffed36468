"""`make agents-interop`: a coding agent (mini-swe-agent) repairs a file through our server.

The model is scripted: it writes raw text of this chat format, thinking and XML calls, so that the prompt, the parser,
the stream of tokens and the OpenAI dialect are ours, and the agent, its client library and the shell are real.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "serve"))

from fake_sampler import FakeSampler
from server_thread import Server

from step35.cli.shipped import SHIPPED
from step35.config.serve import ServeSettings
from step35.data.tokenizer import Tokenizer

MINI = Path(__file__).parents[2] / ".interop" / "agent" / "bin" / "mini"
KEY = "an-agent-key"
TASK = "check.py fails. Repair mean.py so that it passes."
BROKEN = "def mean(numbers):\n    return sum(numbers) / (len(numbers) - 1)\n"
CHECK = "from mean import mean\n\nassert mean([1, 2, 6]) == 3, mean([1, 2, 6])\nprint('all checks pass')\n"
REPAIR = """cat > mean.py <<'EOF'
def mean(numbers):
    # 1 < 2 && "quotes" <b>tags</b> & ünïcode 🙂
    return sum(numbers) / len(numbers) if numbers else 0
EOF"""


def call(command: str) -> str:
    """Return a call of the agent's shell as the model writes it."""
    return f"<tool_call>\n<function=bash>\n<parameter=command>\n{command}\n</parameter>\n</function>\n</tool_call>"


SCRIPT = [
    f"I look first, and run the check.\n</think>\nLet me see.{call('cat mean.py')}{call('python check.py')}",
    f"The divisor is off by one.\n</think>\n{call(REPAIR)}",
    f"Now the check should pass.\n</think>\n{call('python check.py')}",
    f"Done.\n</think>\nRepaired.{call('echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT')}",
]
"""What the model says, turn by turn."""
SEEN = [
    [TASK, '"name": "bash"'],
    ["I look first, and run the check.", "sum(numbers) / (len(numbers) - 1)", "AssertionError: 4.5"],
    ["The divisor is off by one.", "<parameter=command>\ncat > mean.py", '"returncode": 0'],
    ["all checks pass"],
]
"""What the prompt of each turn must hold: the task, and what the agent sent back of the turn before."""


def main() -> int:
    if not MINI.is_file():
        raise SystemExit(f"no agent at {MINI}; run make agents-interop.")
    tokenizer = Tokenizer.load(SHIPPED)
    sampler = FakeSampler(tokenizer, SCRIPT)
    server = Server(sampler, ServeSettings(api_key=KEY))
    try:
        with tempfile.TemporaryDirectory() as folder:
            return report(sampler, *work(Path(folder), server.url))
    finally:
        server.stop()


def work(folder: Path, url: str) -> tuple[dict, str]:
    """Let the agent work in a fresh folder; return its trajectory and what the check prints afterwards."""
    desk, home = folder / "desk", folder / "home"
    desk.mkdir()
    home.mkdir()
    (desk / "mean.py").write_text(BROKEN)
    (desk / "check.py").write_text(CHECK)
    settings = [f"model.model_kwargs.api_base={url}/v1", "model.cost_tracking=ignore_errors", "agent.step_limit=9"]
    command = [str(MINI), "--model", "openai/tiny", "--task", TASK, "--yolo", "--exit-immediately", "--cost-limit", "0"]
    command += ["--output", str(home / "trajectory.json"), "-c", "mini.yaml"]
    command += [word for setting in settings for word in ("-c", setting)]
    done = subprocess.run(command, cwd=desk, env=_variables(home), capture_output=True, text=True, timeout=300)
    if not (home / "trajectory.json").is_file():
        raise SystemExit(f"the agent failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    checked = subprocess.run([sys.executable, "check.py"], cwd=desk, capture_output=True, text=True)
    return json.loads((home / "trajectory.json").read_text()), (checked.stdout + checked.stderr).strip()


def _variables(home: Path) -> dict[str, str]:
    python = str(Path(sys.executable).parent)  # so that the agent's shell finds a `python`
    return os.environ | {
        "HOME": str(home),
        "PATH": python + os.pathsep + os.environ["PATH"],
        "OPENAI_API_KEY": KEY,
        "MSWEA_CONFIGURED": "true",
        "MSWEA_GLOBAL_CONFIG_DIR": str(home),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }


def report(sampler: FakeSampler, trajectory: dict, checked: str) -> int:
    """Print what happened and return 0 if all of it is right."""
    seen = [all(text in prompt for text in texts) for prompt, texts in zip(sampler.prompts, SEEN, strict=False)]
    ended = trajectory["info"]["exit_status"]
    for number, (prompt, right) in enumerate(zip(sampler.prompts, seen, strict=False)):
        tokens, calls = len(sampler.tokenizer.encode(prompt)), SCRIPT[number].count("<tool_call>")
        print(f"turn {number + 1}: prompt of {tokens} tokens, {'as' if right else 'NOT as'} expected; {calls} calls")
    print(f"the agent ended: {ended}; python check.py: {checked}")
    good = seen == [True] * len(SCRIPT) and ended == "Submitted" and checked == "all checks pass"
    print("agents-interop: ok" if good else "agents-interop: WRONG")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
