"""How a worker process learns of a planted defect: Python runs this where it is on its path.

Only the code behind the kinds changes. The command line, the configuration, the requests and the
trials' keys stay what they are without a defect, as with a regression that somebody committed.
"""

import os

if os.environ.get("SD35BENCH_PLANT"):
    from sd35bench.backends.base import KINDS

    KINDS["eager"] = "tests.validity_runs.planted_models:PlantedEager"
    KINDS["int8"] = "tests.validity_runs.planted_models:PlantedInt8"
    KINDS["fake"] = "tests.validity_runs.plants:PlantedFake"
