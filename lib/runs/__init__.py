"""The run store: configuration -> identity -> result table with provenance.

Knows nothing of any problem. An engine says how runs are computed; `plan` what that would cost;
`compute` does it once, over processes, resumably; `publish` puts results under `data/results/`.
"""

from lib.runs.configurations import canonical, columns, identity
from lib.runs.files import StoreFullError, check_writable, write_atomically, write_folder_atomically
from lib.runs.fingerprint import ROOT, changed_since, code_fingerprint, combined
from lib.runs.planning import Engine, Plan, Run, plan
from lib.runs.provenance import environment
from lib.runs.published import (
    PROFILES,
    Published,
    PublishError,
    largest_published,
    publish,
    published_files,
    refuse_dirty_records,
    refuse_dirty_tree,
    results_folder,
)
from lib.runs.records import DamagedRecordError
from lib.runs.scheduling import RunError, assemble, compute, refuse_missing
from lib.runs.store import Checkpoint, Status, Store

__all__ = [
    "PROFILES",
    "ROOT",
    "Checkpoint",
    "DamagedRecordError",
    "Engine",
    "Plan",
    "PublishError",
    "Published",
    "Run",
    "RunError",
    "Status",
    "Store",
    "StoreFullError",
    "assemble",
    "canonical",
    "changed_since",
    "check_writable",
    "code_fingerprint",
    "columns",
    "combined",
    "compute",
    "environment",
    "identity",
    "largest_published",
    "plan",
    "publish",
    "published_files",
    "refuse_dirty_records",
    "refuse_dirty_tree",
    "refuse_missing",
    "results_folder",
    "write_atomically",
    "write_folder_atomically",
]
