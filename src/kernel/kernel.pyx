# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The hot loops, compiled once per (instruction set, precision).

Walk: dispatch.pyx calls `run` once a task  →  this file (one task)  →  block.pxi (one block of keys)  →  softmax.pxi and
products.pxi (the loops)  →  simd.h (vectors). Beside them tasks.pxi (which rows a task has), task.pxi (who sees what),
logits.pxi and dropout.pxi (options), additive.pxi (scores that are no products), normalizers.pxi and thresholds.pxi (weights
that are no softmax), pack.pxi (moves), few.pxi (the other path: few rows; few_tiles.pxi its loops), weights.pxi (the weights
themselves), gradient.pxi (the backward pass), store.pxi (new tokens of a cache). Kinds of their own: graph.pxi (along edges;
edges.pxi its loops, graph_gradient.pxi) and linear.pxi (features in the place of the exponential).

One task is (batch, head, block of queries); queries live in vector lanes. Memory of a task, reused for every task of a thread:

    Qt [D][LANES]      the block of queries, transposed once
    S  [BLOCK][LANES]  scores of a block of keys, then their weights: written and read by every stage below
    Ot [Dv][LANES]     the running output, transposed, unnormalised
    m, l, c [LANES]    reference of the exponential, running sum, and the factor of the last rescaling

For each block of keys, at fixed multiples of BLOCK so that a row's sums do not depend on where its block of queries starts:

    S = K Qt  →  softcap, bias, masks  →  P = 2^((S - m) κ)  →  Ot = Ot c + Vt P

Glossary: B H Hkv L S D Dv as in fastattn.h; q k v o lse; m maximum, l sum; lo/hi: lane i sees keys lo <= j < hi.
"""
include "simd.pxi"

from cpython.pycapsule cimport PyCapsule_New
from libc.string cimport memcmp, memcpy, memset

include "abi.pxi"

cdef extern from "threads.h" nogil:
    int64_t fastattn_add(int64_t*, int64_t)
    void fastattn_yield()

cdef extern from *:
    # Keys of a block: P (96 x 256 bytes) and the block of V share a 48 KiB first-level cache at D = 64, and a sum of 96
    # products before it joins the running sum keeps the rounding error at that of pairwise schemes (docs/accuracy.md).
    enum: BLOCK "FASTATTN_TILE_KEYS"

cdef enum:
    PAIRS = 48              # of keys in a block
    HEADROOM = 10           # a maximum may exceed the reference of the exponential by this power of two
    CHAINS = 8              # interleaved sums of a block's weights; BLOCK is even, so pairs of keys do not straddle blocks
    WASTE = 24              # vector x key products a wider segment may waste: narrow ones run at 0.8 of the speed
    FAR_BYTES = 4194304     # of keys and values that are not in a core's caches
    PACKED_BYTES = 262144   # that keys and values of a block may take together where they are packed
    NARROW = 3              # pairs of keys between two parts of a block that are multiplied rather than skipped
    POLL_EVERY = 8          # blocks of keys between two looks at `stop`
    LISTED = 96             # scores of a row that may be above its threshold, and how many of a full list may still be
    LISTED_LEFT = 72
    FIRST_STEPS = 3

include "products.pxi"
include "pack.pxi"
include "softmax.pxi"
include "logits.pxi"
include "task.pxi"
include "dropout.pxi"
include "thresholds.pxi"
include "few_tiles.pxi"
include "few.pxi"
include "additive.pxi"
include "normalizers.pxi"
include "block.pxi"
include "tasks.pxi"
include "weights.pxi"
include "gradient.pxi"
include "store.pxi"
include "edges.pxi"
include "graph_gradient.pxi"
include "graph.pxi"
include "linear.pxi"
include "layer.pxi"
include "norm.pxi"


cdef double finish_row(Task* t, Py_ssize_t i) noexcept nogil:
    # The row's log-sum-exp; its factor in t.c where that is not 1/l. A sink is one more logit, without a value. A row without
    # a visible key is zero and has its sink's logit, or -inf.
    cdef const fastattn_problem* p = t.p
    cdef double m = t.m[i]*(t.kappa*0.69314718055994530942)       # in nats; the product of constants first: it is near scale
    cdef double l = t.l[i]
    cdef double sink = -INFINITY
    cdef double top
    if p.sinks != NULL:
        sink = (<const real*>p.sinks)[t.h + i//t.each]
    if l == 0:
        # Nothing is visible, or all visible scores are -inf, which came from infinite inputs: softmax of them is NaN.
        if sink - sink == 0 or not sees_any(t, i):
            return sink
        l = NAN
        t.c[i] = NAN
    if sink == -INFINITY:
        return m + log(l)
    top = m if m > sink else sink
    l = l*exp(m - top) + exp(sink - top)
    t.c[i] = <real>(exp(m - top)/l)
    return top + log(l)


cdef void normalise(Task* t, real* lse) noexcept nogil:
    # c = 1 / l, and the rows' log-sum-exp
    cdef Py_ssize_t i
    cdef double row_lse
    if t.p.normalizer != FASTATTN_SOFTMAX:
        settle_rows(t, lse)
        return
    for i in range(t.vectors*VL):
        t.c[i] = 1/t.l[i] if t.l[i] != 0 else <real>0
    for i in range(t.n_queries):
        if t.l[i] == 0 or t.p.sinks != NULL or lse != NULL:
            row_lse = finish_row(t, i)
            if lse != NULL:
                lse[lane_at(t, &t.p.lse, i)] = <real>row_lse


cdef void empty_rows(const fastattn_problem* p, const Place* place, Py_ssize_t begin, Py_ssize_t end) noexcept nogil:
    # rows [begin, end) of the task's heads
    cdef char* out
    cdef Py_ssize_t i, d
    cdef int64_t h
    if begin >= end:
        return
    for h in range(place.h, place.h + place.heads):
        out = base_of(p, &p.out, place.b, h, p.cu_q, False)
        for i in range(begin, end):
            d = 0
            while d < p.Dv:
                v_store_as(out, i*p.out.row + d*p.out.col, p.out.col, v_zero(), p.Dv - d, p.out.kind)
                d += VL
        if p.lse.data != NULL:
            for i in range(begin, end):
                (<real*>base_of(p, &p.lse, place.b, h, p.cu_q, False))[i*p.lse.row] = -INFINITY


cdef void start(Task* t) noexcept nogil:
    # before the first block
    cdef Py_ssize_t i
    cdef int a
    t.block = t.begin - t.begin % BLOCK
    t.tile = t.tile_begin
    if t.stage == ATTEND:
        t.settled = True
        t.cut = False
        memset(t.Ot, 0, (t.n_queries*whole(t.p.Dv) if t.few else t.p.Dv*LANES)*sizeof(real))
        for i in range(LANES):
            t.l[i] = 0
            if t.p.normalizer == FASTATTN_SOFTMAX:
                t.m[i] = -INFINITY
    if t.stage != WEIGH:
        t.some = 0
    t.later.n = 0
    expect_masks(t, t.block, min(t.end, t.block + BLOCK))
    for a in range(t.later.n):
        for i in range(t.later.rows[a].left):
            v_fetch_later(t.later.rows[a].at + i*t.later.rows[a].row, t.later.rows[a].size)


cdef bint step(Task* t) noexcept nogil:
    # the next block; False if there is none
    cdef bint across = t.stage == WEIGH and (t.p.reduce == FASTATTN_SUM or t.p.reduce == FASTATTN_MAX)
    if not next_block(t, &t.block):
        return False
    if across:
        memset(t.across, 0, BLOCK*VL*sizeof(real))
    key_block(t, t.block, min(t.end, t.block + BLOCK))
    if across:
        reduce_lanes(t, t.block, min(t.end, t.block + BLOCK) - t.block)
    t.block += BLOCK
    return True


cdef bint walk(Task* each, int n, bint caller) noexcept nogil:
    # All blocks of keys of n tasks, in turn; False if the call was abandoned.
    cdef const fastattn_problem* p = each.p
    cdef int count = 0
    cdef int i
    cdef bint more = True
    for i in range(n):
        start(&each[i])
    each.late.task = NULL
    each.late.side = 0
    while more:
        more = False
        for i in range(n):
            more |= step(&each[i])
        count += n
        if count >= POLL_EVERY and p.stop != NULL:
            count = 0
            if caller and p.poll != NULL:
                p.poll(p.poll_data)
            if p.stop[0]:
                return False
    if each.few:
        add_late(each)
    return True


cdef bint finite_output(const Task* t) noexcept nogil:
    if t.few:
        return all_finite(t.Ot, whole(t.p.Dv), t.n_queries, t.p.Dv)
    return all_finite(t.Ot, LANES, t.p.Dv, t.vectors*VL)


cdef void finish(Task* t) noexcept nogil:
    # what is left behind the last block
    cdef const fastattn_problem* p = t.p
    cdef const Place* place = &t.place
    cdef char* out
    cdef real* lse = NULL
    cdef Py_ssize_t i
    if t.few and place.splits > 1:
        keep_state(t, place.group, place.split)
        if fastattn_add(<int64_t*>p.state + place.group, 1) + 1 < place.splits:
            return
        merge_states(t, place.group, place.splits)
    empty_rows(p, place, t.q_begin + t.each, place.q_end)
    out = base_of(p, &p.out, t.b, t.h, p.cu_q, False)
    if p.lse.data != NULL:
        lse = <real*>base_of(p, &p.lse, t.b, t.h, p.cu_q, False)
    normalise(t, lse)
    if p.dropout != 0:
        for i in range(t.vectors*VL):
            t.c[i] *= <real>p.keep
    if t.gathers:
        gather_out(t, out)
    elif t.few:
        few_out(t, out)
    else:
        write_out(t.Ot, t.c, t.n_queries, t.vectors, p.Dv, out + t.q_begin*p.out.row*v_size(p.out.kind), p.out.row, p.out.col,
                  p.out.kind)


cdef void run(const fastattn_problem* p, int64_t n_tasks, int64_t task, int32_t caller, void* memory) noexcept nogil:
    cdef Task* each = <Task*>memory
    cdef Place place
    cdef int n = 0
    cdef int i
    if p.reduce == FASTATTN_GRADIENT:
        run_gradient(p, task, caller, memory)
        return
    if not attends(p):
        run_weights(p, task, caller, memory)
        return
    for i in range(p.together):
        if not locate(p, task, i, &place):
            break
        if not prepare(&each[n], p, &place, n, memory):
            empty_rows(p, &place, place.q_begin, place.q_end)
            continue
        each[n].cold = not place.few and n_tasks <= 4*p.B*p.H
        expect_task(&each[n], n_tasks, task + 1)
        n += 1
    if n > 1:
        for i in range(n):
            each[i].next = &each[(i + 1) % n]
    if n > 0 and finds_threshold(p) and not find_thresholds(each, caller):
        return
    if n == 0 or (not each.gathers and not walk(each, n, caller)):
        return
    for i in range(n):
        each[i].next = NULL
        if each[i].cut and not finite_output(&each[i]):
            # 0 · NaN or 0 · Inf of a value may have reached lanes that do not see its key
            each[i].careful = True
            if not walk(&each[i], 1, caller):
                return
        finish(&each[i])


cdef void exp2_array(const void* x, void* y, int64_t n) noexcept nogil:
    cdef int64_t i = 0
    while i < n:
        v_store_part(<real*>y + i, v_exp2(v_load_part(<const real*>x + i, n - i)), n - i)
        i += VL


cdef void tanh_array(const void* x, void* y, int64_t n) noexcept nogil:
    cdef int64_t i = 0
    while i < n:
        v_store_part(<real*>y + i, v_tanh(v_load_part(<const real*>x + i, n - i)), n - i)
        i += VL


cdef double peak(int64_t rounds) noexcept nogil:
    # Twelve chains of FMAs that never leave the registers: what the units can do. Returns the operations done.
    cdef vf acc[12]
    cdef vf a = v_set1(<real>0.999)
    cdef vf b = v_set1(<real>0.001)
    cdef int64_t _i
    cdef int j
    cdef real sink[VL]
    for j in range(12):
        acc[j] = v_set1(<real>(rounds % 7) + <real>(j*0.1))     # unknown to the compiler: it folds chains it can see through
    for _i in range(rounds):
        for j in range(12):
            acc[j] = v_fma(acc[j], a, b) if WORD == 1 else v_dot(a, b, acc[j])
    for j in range(1, 12):
        acc[0] = v_add(acc[0], acc[j])
    v_store(sink, acc[0])
    return rounds*12.0*VL*2*WORD + (0 if sink[0] > -1 else 1)


cdef double read_bytes(const void* p, int64_t n) noexcept nogil:
    # Every whole line of n bytes, into four sums so that nothing but the memory is waited for.
    cdef vf acc[4]
    cdef const real* at = <const real*>p
    cdef int64_t i
    cdef int j
    cdef real sink[VL]
    for j in range(4):
        acc[j] = v_zero()
    for i in range(n // <int64_t>(4*VL*sizeof(real))):
        for j in range(4):
            acc[j] = v_max(acc[j], v_load(at + (4*i + j)*VL))
    v_store(sink, v_max(v_max(acc[0], acc[1]), v_max(acc[2], acc[3])))
    return sink[0]


cdef fastattn_kernel kernel
kernel.abi = FASTATTN_ABI
kernel.bits = 8*sizeof(real)//WORD
kernel.lanes = LANES
kernel.vector = VL
kernel.tasks = tasks
kernel.state = state
kernel.scratch = scratch
kernel.run = run
kernel.store = store
kernel.graph_scratch = graph_scratch
kernel.graph = run_graph
kernel.linear_scratch = linear_scratch
kernel.linear = run_linear
kernel.pack = pack_panels
kernel.layer_tasks = layer_tasks
kernel.layer_scratch = layer_scratch
kernel.layer = run_layer
kernel.norm_scratch = norm_scratch
kernel.norm = run_norm
kernel.exp2 = exp2_array
kernel.tanh = tanh_array
kernel.peak = peak
kernel.read = read_bytes

table = PyCapsule_New(&kernel, "fastattn_kernel", NULL)
