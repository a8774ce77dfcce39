"""Load generators, and what they measure. They talk HTTP, so that they work against any server."""

from isomoe.bench.client import Endpoint, OpenAIClient
from isomoe.bench.load import send_all
from isomoe.bench.metrics import Latency, Outcome, Run, Summary
from isomoe.bench.offline import OfflineEngine, OfflineRun
from isomoe.bench.report import ServeReport
from isomoe.bench.server import launched_server
from isomoe.bench.serving import LoadPlan, compare_offline, measure_waves
from isomoe.bench.target import Target, find_target
from isomoe.bench.workload import BenchRequest, Prompt, Workload, arrivals, read_dataset

__all__ = [
    "BenchRequest",
    "Endpoint",
    "Latency",
    "LoadPlan",
    "OfflineEngine",
    "OfflineRun",
    "OpenAIClient",
    "Outcome",
    "Prompt",
    "Run",
    "ServeReport",
    "Summary",
    "Target",
    "Workload",
    "arrivals",
    "compare_offline",
    "find_target",
    "launched_server",
    "measure_waves",
    "read_dataset",
    "send_all",
]
