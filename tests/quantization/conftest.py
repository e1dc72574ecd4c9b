from tests.run_fixtures import *  # noqa: F403  fixtures for the tests of this folder
