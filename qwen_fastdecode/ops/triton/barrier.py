"""The barrier that the programs of a thread block cluster share (`clusters` launches them in one): JIT code alone.

`size` is how many programs a cluster has, `nvidia` whether there are clusters. In the interpreter there are none, and
programs run one after the other: each reads what those before it left.
"""

import triton
import triton.language as tl


@triton.jit
def arrive(size: tl.constexpr, nvidia: tl.constexpr):
    """Says that this program has come so far; traps where it was not launched in a cluster of `size`.

    All threads of all programs of the cluster pass the barrier. A release: what they read, they have read, and what
    they wrote, the others see once they have waited.
    """
    if nvidia:
        tl.inline_asm_elementwise(
            "{ .reg .pred %other; .reg .b32 %size; mov.u32 %size, %cluster_nctaid.x; setp.ne.u32 %other, %size, $1; "
            "@%other trap; barrier.cluster.arrive.release.aligned; mov.b32 $0, 0; }",
            "=r,r",
            [tl.full([], size, tl.int32)],
            tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.debug_barrier()


@triton.jit
def wait(nvidia: tl.constexpr):
    """Waits until all programs of the cluster have arrived."""
    if nvidia:
        tl.inline_asm_elementwise(
            "barrier.cluster.wait.acquire.aligned; mov.b32 $0, 0;", "=r", [], tl.int32, is_pure=False, pack=1
        )
    else:
        tl.debug_barrier()
