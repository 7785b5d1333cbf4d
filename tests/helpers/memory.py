"""Peak memory of a call, measured in a fresh process."""

from __future__ import annotations

import subprocess
import sys
import textwrap


def peak_growth(body: str) -> int:
    """Bytes by which the resident set of a fresh process peaks while the body's ``call`` runs."""
    program = textwrap.dedent(
        """
        import torch
        from opd_kernels import LinearLogits, TopK, linear_topk_rkl, select_topk, topk_rkl
        torch.set_num_threads(2)

        def resident(field):
            for line in open("/proc/self/status"):
                if line.startswith(field):
                    return int(line.split()[1]) * 1024

        {body}
        call(2)  # what is allocated once: operators, threads
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")
        before = resident("VmRSS")
        kept = call(N)
        print(resident("VmHWM") - before)
        """
    ).format(body=textwrap.dedent(body))
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return int(run.stdout)
