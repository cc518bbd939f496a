"""The sandbox: runs untrusted programs behind one narrow interface (`rewards.sandbox.api`).

Left out: what a right answer is (`rewards.code`, `rewards.sandbox.grading`).
"""
