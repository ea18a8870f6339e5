"""What a training cost: GPU hours, energy and carbon (paper Sec. 4.2, Tab. 4), from the run's own log; nothing else.

    energy [kWh] = GPU hours x power [W] x PUE / 1000        CO2eq [kg] = energy x intensity

Used by `python evaluate.py cost`. A line of log.jsonl tells the seconds since the line before and the number of processes, a
GPU each. What a run lost when it was killed is not in its log; nor are the cache and the evaluation.
"""

from pathlib import Path

from evaluation.tables import markdown
from plumbing.runs import read_log


def gpu_hours(run):
    """GPU hours in run/log.jsonl. ValueError if a line does not tell them, FileNotFoundError if there is no log."""
    lines = read_log(Path(run) / "log.jsonl", ("seconds", "processes"))
    return sum(line["seconds"] * line["processes"] for line in lines) / 3600


def cost_table(hours, power, pue, intensity):
    """Tab. 4 as Markdown, a row a run and their sum.

    hours: {run: GPU hours}; power: W a GPU; pue: the data centre's power usage effectiveness; intensity: kg CO2eq a kWh.
    """
    hours = hours | ({"together": sum(hours.values())} if len(hours) > 1 else {})
    energy = {run: time * power * pue / 1000 for run, time in hours.items()}
    rows = [[run, f"{hours[run]:.3f}", f"{e:.3f}", f"{e * intensity:.3f}"] for run, e in energy.items()]
    return markdown(["", "GPU hours", "energy, kWh", "CO2eq, kg"], rows)
