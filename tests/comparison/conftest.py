import json

import pytest

from lightsft import registry
from lightsft.comparison import compare as comparing
from lightsft.comparison import jobs
from lightsft.comparison.worker import LAST, ended, result_of
from tests.comparison import sample_results, strangers
from tests.comparison.report_pages import report
from tests.run_fixtures import *  # noqa: F403  fixtures for the tests of this folder


class InProcess:
    """A worker that runs jobs here: what they take and give still passes through JSON."""

    def __init__(self):
        self.ran, self.events = [], []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def start(self, job, arguments, log):
        about = arguments.get("spec", {}).get("label"), arguments.get("seed")
        self.ran.append((job, *about))
        number = len(self.ran)
        arguments = json.loads(json.dumps(arguments))
        event = ended(lambda: getattr(jobs, job)(arguments, lambda event: self.events.append((number, event))))
        self.events.append((number, json.loads(json.dumps(event))))
        return number

    def next_event(self):
        return self.events.pop(0)

    def run(self, job, arguments, log, on_event=lambda event: None):
        number = self.start(job, arguments, log)
        about, event = self.next_event()
        while (about, event["event"] in LAST) != (number, True):
            on_event(event)
            about, event = self.next_event()
        return result_of(event)

    def trials(self):
        """(strategy, seed) of every trial that was run."""
        return [(label, seed) for job, label, seed in self.ran if job == "trial"]


@pytest.fixture
def worker(monkeypatch):
    """Comparisons of this test run their jobs in this process."""
    here = InProcess()
    monkeypatch.setattr(comparing, "Worker", lambda at_once: here)
    return here


@pytest.fixture
def stranger_path(tmp_path, monkeypatch):
    """This test and the processes it starts know the strategies of `strangers`."""
    path = strangers.install(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.syspath_prepend(tmp_path / "site")
    registry._entries.cache_clear()
    yield path
    registry._entries.cache_clear()


@pytest.fixture(scope="session")
def sample_report(tmp_path_factory):
    """The report of the sample results in both forms, and its page read."""
    results, examples = sample_results.sample()
    return report(results, tmp_path_factory.mktemp("sample"), examples)
