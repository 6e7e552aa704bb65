"""Figures of the campaigns, printed at the end of a run: points tried, violations found."""
import pytest

_KEY = pytest.StashKey[list]()


@pytest.fixture
def figures(request):
    """figures(what, tried, violations): note a campaign for the summary, and fail where there are violations."""
    def note(what, tried, violations):
        request.config.stash.setdefault(_KEY, []).append((what, tried, len(violations)))
        assert tried and not violations, "\n".join(map(str, violations[:10]))
    return note


def pytest_terminal_summary(terminalreporter, config):
    """One line per campaign."""
    for what, tried, wrong in config.stash.get(_KEY, []):
        terminalreporter.write_line(f"campaign: {what}: {tried} tried, {wrong} violations")
