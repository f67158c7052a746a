# A linear layer, y = activation(x Wᵀ + b), whose weight was packed once: panels of LANES outputs, product N as it stands.
#
#     W [N][K]  ──▶  panels [N/LANES][K][LANES]                  pack_panels; pairs: words of two bfloat16, [K/2][LANES]
#
#                      panel: K │ LANES │    in even parts of at most INNER of K: each is summed from zero, in registers
#     x: LAYER_ROWS │ K │   out │ LANES │    + b with the last part; what has an activation goes by way of C
#
# A task is a block of rows and a run of panels. An element's sum has one order, whatever else is in the call.
# x is read in place where its rows are reals that lie together; else a block of them is packed. Where products take pairs
# x is rounded to bfloat16 for it. Panels of bfloat16 are otherwise widened a part at a time.

cdef enum:
    LAYER_ROWS = 96
    INNER = 512             # of K: 0.93 to 0.97 of the FMA peak (Zen 5), 256 0.91 to 0.96, with twice the passes over out


cdef struct Layer:
    real* C                         # [LAYER_ROWS][LANES] on the way to an activation, or to an out of another kind
    real* part                      # [INNER][LANES] of a panel that is widened
    real* x                         # [LAYER_ROWS][K'] rows that are packed


cdef inline bint reads_rows(const fastattn_layer* p) noexcept nogil:
    return WORD == 1 and p.x.kind == FASTATTN_REAL and p.x.col == 1


cdef size_t lay_out_layer(Layer* t, const fastattn_layer* p, char* memory) noexcept nogil:
    t.C = <real*>memory
    t.part = t.C + LAYER_ROWS*LANES
    t.x = t.part + (INNER*LANES if WORD == 1 and p.kind != FASTATTN_REAL else 0)
    return <char*>(t.x + (0 if reads_rows(p) else LAYER_ROWS*whole(p.K))) - memory


cdef size_t layer_scratch(const fastattn_layer* p) noexcept nogil:
    cdef Layer t
    return lay_out_layer(&t, p, NULL)


cdef int64_t layer_tasks(fastattn_layer* p, int64_t threads) noexcept nogil:
    # Blocks of rows; where they are few, their panels are shared out too, so that none waits long for the last task: fewer if
    # each task packs its rows again.
    cdef int64_t panels = (p.N + LANES - 1)//LANES
    cdef int64_t enough = (64 if reads_rows(p) else 4)*threads
    p.row_blocks = (p.M + LAYER_ROWS - 1)//LAYER_ROWS
    p.column_blocks = 1
    if threads > 1 and p.row_blocks < enough:
        p.column_blocks = min(panels, (enough + p.row_blocks - 1)//p.row_blocks)
    return p.row_blocks*p.column_blocks


cdef void pack_panels(const fastattn_array* weight, int64_t N, int64_t K, int32_t kind, void* panels,
                      void* memory) noexcept nogil:
    # Of reals, or for pairs of bfloat16, as they come; else rounded to bfloat16, a panel at a time by way of `memory`.
    cdef int64_t panel, n
    cdef Py_ssize_t i
    cdef real* to
    for panel in range((N + LANES - 1)//LANES):
        n = panel*LANES
        to = <real*>panels + n*(K//WORD) if WORD == 2 or kind == FASTATTN_REAL else <real*>memory
        pack_queries(<const char*>weight.data + n*weight.row*v_size(weight.kind), weight.row, weight.col, weight.kind,
                     min(N - n, <int64_t>LANES), LANES//VL, K//WORD, 1, to)
        i = 0
        while to == memory and i < K*LANES:
            v_store_as(<uint16_t*>panels + n*K, i, 1, v_load(to + i), VL, kind)
            i += VL


cdef void widen_part(const uint16_t* panel, Py_ssize_t n, real* to) noexcept nogil:
    cdef Py_ssize_t i = 0
    while i < n*LANES:
        v_store(to + i, v_load_as(panel, i, FASTATTN_BF16))
        i += VL


cdef void pack_inputs(const fastattn_layer* p, int64_t first, Py_ssize_t n, real* to) noexcept nogil:
    # rows of x as reals, or rounded, as words of pairs
    cdef Py_ssize_t ld = whole(p.K)
    cdef Py_ssize_t i, d
    cdef vf x
    for i in range(n):
        d = 0
        while d < p.K:
            x = load_row(p.x.data, (first + i)*p.x.row + d*p.x.col, p.x.col, p.K - d, p.x.kind)
            if WORD == 1:
                v_store(to + i*ld + d, x)
            else:
                v_store_as(to + i*ld, d, 1, x, p.K - d, FASTATTN_BF16)
            d += VL


cdef inline vf activated(vf x, const int activation) noexcept nogil:
    cdef vf e
    if activation == FASTATTN_RELU_LAYER:
        return v_where_lt(x, v_zero(), v_zero(), x)         # NaN stays
    if activation == FASTATTN_GELU_TANH:
        e = v_mul(v_mul(v_fma(v_mul(x, x), v_set1(<real>0.044715), v_set1(1)), x), v_set1(<real>0.79788456080286535588))
        return v_mul(v_mul(x, v_set1(<real>0.5)), v_add(v_set1(1), v_tanh(e)))
    if activation == FASTATTN_SILU:
        e = v_min(v_exp2(v_mul(x, v_set1(<real>1.4426950408889634074))), v_set1(<real>1.8e19))
        return v_mul(x, v_div(e, v_add(e, v_set1(1))))
    return x


cdef inline void store_activated(const int activation, const fastattn_layer* p, const real* C, int64_t row, Py_ssize_t rows,
                                 int64_t n) noexcept nogil:
    # out = activation(C + b) for outputs n .. n + LANES - 1
    cdef const real* bias = <const real*>p.bias
    cdef int64_t size = v_size(p.out.kind)
    cdef bint plain = p.out.kind == FASTATTN_REAL and p.out.col == 1 and p.N - n >= LANES
    cdef vf b[BLOCK_VECTORS]
    cdef vf x[BLOCK_VECTORS]
    cdef char* out
    cdef Py_ssize_t i
    cdef int g
    for g in range(BLOCK_VECTORS):
        b[g] = v_load_part(bias + n + g*VL, p.N - n - g*VL) if bias != NULL and p.N > n + g*VL else v_zero()
    for i in range(rows):
        out = <char*>p.out.data + (row + i)*p.out.row*size
        for g in range(BLOCK_VECTORS):
            x[g] = activated(v_add(v_load(C + i*LANES + g*VL), b[g]), activation)
        if activation == FASTATTN_GELU:
            g = 0
            while g < BLOCK_VECTORS:
                v_gelu(x + g, GROUP)
                g += GROUP
        for g in range(BLOCK_VECTORS):
            if plain:
                v_store(<real*>out + n + g*VL, x[g])
            elif p.N > n + g*VL:
                v_store_as(out, (n + g*VL)*p.out.col, p.out.col, x[g], p.N - n - g*VL, p.out.kind)


cdef void finish_tile(const fastattn_layer* p, const real* C, int64_t row, Py_ssize_t rows, int64_t n) noexcept nogil:
    if p.activation == FASTATTN_RELU_LAYER:
        store_activated(FASTATTN_RELU_LAYER, p, C, row, rows, n)
    elif p.activation == FASTATTN_GELU:
        store_activated(FASTATTN_GELU, p, C, row, rows, n)
    elif p.activation == FASTATTN_GELU_TANH:
        store_activated(FASTATTN_GELU_TANH, p, C, row, rows, n)
    elif p.activation == FASTATTN_SILU:
        store_activated(FASTATTN_SILU, p, C, row, rows, n)
    else:
        store_activated(FASTATTN_IDENTITY, p, C, row, rows, n)


cdef void product_layer(int vectors, const real* A, Py_ssize_t lda, const real* B, Py_ssize_t n, real* C, Py_ssize_t ldc,
                        Py_ssize_t m, How how, const real* last) noexcept nogil:
    # C[m, vectors*VL] = A[m, n] · B[n, vectors*VL], or += it, + last. Tall tiles, two vectors at a time: B lies in the second
    # level of the cache, and they read it half as often. The first rows go in wide ones, which ask for more of B at once: it
    # comes from further away then. So do all rows where they are few, or where those of A meet in one set of the first level.
    if m < LAYER_ROWS//2 or lda*sizeof(real) % 4096 == 0:
        groups_n(GROUP, vectors, A, lda, B, LANES, n, C, ldc, m, how, 1, last, NULL)
        return
    groups_n(GROUP, vectors, A, lda, B, LANES, n, C, ldc, rows_of(2), how, 1, last, NULL)
    groups_n(2, vectors, A + rows_of(2)*lda, lda, B, LANES, n, C + rows_of(2)*ldc, ldc, m - rows_of(2), how, 1, last, NULL)


cdef void run_panel(const fastattn_layer* p, const Layer* t, const real* x, Py_ssize_t ldx, int64_t row, Py_ssize_t rows,
                    int64_t panel) noexcept nogil:
    # out of the rows and of a panel's outputs
    cdef Py_ssize_t size = sizeof(real) if WORD == 2 or p.kind == FASTATTN_REAL else 2
    cdef Py_ssize_t K = p.K//WORD
    cdef Py_ssize_t parts = max(<Py_ssize_t>1, (K + INNER - 1)//INNER)
    cdef int64_t outputs = min(p.N - panel*LANES, <int64_t>LANES)
    cdef int vectors = <int>((outputs + VL - 1)//VL)
    cdef bint direct = (p.activation == FASTATTN_IDENTITY and p.out.kind == FASTATTN_REAL and p.out.col == 1
                        and outputs == LANES)
    cdef real* C = <real*>p.out.data + row*p.out.row + panel*LANES if direct else t.C
    cdef Py_ssize_t ldc = p.out.row if direct else LANES
    cdef const real* bias = <const real*>p.bias + panel*LANES if direct and p.bias != NULL else NULL
    cdef const char* at = <const char*>p.panels + panel*K*LANES*size
    cdef Py_ssize_t part, k, depth
    cdef const real* B
    for part in range(parts):
        k = K*part//parts
        depth = K*(part + 1)//parts - k
        B = <const real*>at
        if WORD == 1 and p.kind != FASTATTN_REAL:
            widen_part(<const uint16_t*>at, depth, t.part)
            B = t.part
        at += depth*LANES*size
        product_layer(vectors, x + k, ldx, B, depth, C, ldc, rows, ADD if part > 0 else STORE,
                      bias if part == parts - 1 else NULL)
    if not direct:
        finish_tile(p, t.C, row, rows, panel*LANES)


cdef void run_layer(const fastattn_layer* p, int64_t task, void* memory) noexcept nogil:
    cdef Layer t
    cdef int64_t block = task//p.column_blocks
    cdef int64_t columns = task % p.column_blocks
    cdef int64_t panels = (p.N + LANES - 1)//LANES
    cdef int64_t tiles = (p.M + rows_of(2) - 1)//rows_of(2)
    cdef int64_t row = tiles*block//p.row_blocks*rows_of(2)
    cdef Py_ssize_t rows = min(p.M, tiles*(block + 1)//p.row_blocks*rows_of(2)) - row
    cdef Py_ssize_t ldx = p.x.row
    cdef const real* x
    cdef int64_t panel
    lay_out_layer(&t, p, <char*>memory)
    if reads_rows(p):
        x = <const real*>p.x.data + row*ldx
    else:
        pack_inputs(p, row, rows, t.x)
        x = t.x
        ldx = whole(p.K)
    for panel in range(panels*columns//p.column_blocks, panels*(columns + 1)//p.column_blocks):
        run_panel(p, &t, x, ldx, row, rows, panel)
