"""A plugin of pytest that tells of a failed test at once: a run that is stopped at its limit comes to no summary."""

import pytest
from gpu_parts import FAILED


class Teller:
    """Prints the name of each test that fails, and the first line of why."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self.terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.failed:
            return
        crash = getattr(report.longrepr, "reprcrash", None)
        lines = (crash.message if crash else report.longreprtext).splitlines() or [""]
        self.terminal.ensure_newline()
        self.terminal.write_line(f"{FAILED}{report.nodeid}: {lines[0]}")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Listen where all reports come to, not in the workers."""
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Teller(terminal))
