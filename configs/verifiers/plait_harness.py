"""The harness under a name that verifiers can import: put this folder on PYTHONPATH.

    PYTHONPATH=configs/verifiers vf-eval gsm8k --env.agent.harness.id plait-harness \
        --env.agent.harness.format threadweaver --env.agent.harness.tokenizer MODEL
"""

from plait.train.handoff.verifiers import PlaitHarness, PlaitHarnessConfig

__all__ = ["PlaitHarness", "PlaitHarnessConfig"]
