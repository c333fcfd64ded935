"""Importing this module replaces verl's fused linear op, in a run's workers too, where no code of yours calls `patch`.

    VERL_USE_EXTERNAL_MODULES=grpo_kernels.integrations.verl_patch
"""

from grpo_kernels.integrations.verl_linear import patch

undo = patch()
