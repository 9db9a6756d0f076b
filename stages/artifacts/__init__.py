"""The run directory: stages, their keys and manifests, journals, and the one way a stage is run.

Torch-free; pyarrow is imported by stages.artifacts.parquet alone, and that by what reads or writes tables.
"""

from stages.artifacts.execute import Decision, decide, execute, look, survey
from stages.artifacts.journal import Journal
from stages.artifacts.keys import STAGES, upstream_of
from stages.artifacts.manifest import Manifest
from stages.artifacts.run import RunDir
from stages.artifacts.seeds import derive
from stages.artifacts.stage import Progress, Report, Session, StageContext, StageId

__all__ = [
    "STAGES",
    "Decision",
    "Journal",
    "Manifest",
    "Progress",
    "Report",
    "RunDir",
    "Session",
    "StageContext",
    "StageId",
    "decide",
    "derive",
    "execute",
    "look",
    "survey",
    "upstream_of",
]
