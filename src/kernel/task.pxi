# The state of one task, and which keys each of its lanes sees.

cdef struct Late


cdef struct Back


cdef enum Stage:
    ATTEND                  # the output
    FIND                    # thresholds: what could be above them of all scores
    RAISE                   # thresholds of rows where that is too many: a step of Newton's method
    WEIGH                   # weights, or what is reduced from them, with references that are final
    DERIVE                  # gradients


cdef struct Place:                  # which rows of which heads, and of few rows which keys
    int64_t b, h, q_begin, q_end
    int64_t heads                   # from h on, all of one key head
    bint few
    int64_t group, split, splits    # of few rows


cdef struct Task:
    const fastattn_problem* p
    Place place
    const Task* next                # whose turn is next, of several tasks that take blocks in turn; else NULL
    # Lane i is row q_begin + i % each of head h + i // each. All heads of a task read the same keys and values.
    int64_t b, h
    Py_ssize_t q_begin, each, heads
    Py_ssize_t n_queries            # valid lanes; rows past query_lengths are not
    int vectors
    bint few                        # lanes of the products run over D and Dv: few.pxi
    # Lane i sees keys lo[i] <= j < hi[i], of which the mask may hide some. Some lane sees [k_begin, k_end), all see
    # [full_begin, full_end). The task itself walks [begin, end) of them.
    int64_t lo[LANES]
    int64_t hi[LANES]
    int64_t k_begin, k_end, full_begin, full_end
    int64_t begin, end
    int64_t block                   # where it is
    int64_t hole_begin, hole_end    # keys that nobody sees
    uint64_t lanes                  # bits of the block's lanes
    uint64_t words[BLOCK]
    const uint64_t* seen            # [BLOCK] the lanes that see each key of the present block, where not all see all
    uint64_t some                   # the lanes that have seen some key, as far as masks say
    int64_t tile, tile_begin, tile_end      # the present one and the range of p.tiles for these rows
    int tile_shift                  # bit of the first row
    uint64_t tile_rows, repeat      # bits of its rows that a head has; times repeat, those of all heads
    const char* k                   # of the batch and head
    const char* v
    const float* k_scale
    const float* v_scale
    const int32_t* pages            # table of the batch, or NULL
    const char* bias
    const uint8_t* mask
    real kappa                      # logits of S to exponents of 2; > 0
    double exact_kappa
    bint separate                   # logits are made apart from the product: S has no scale left
    bint cold                       # few blocks of queries share these keys: worth fetching the values early
    bint settled                    # no maximum has outgrown its reference yet: worth fusing
    bint cut                        # a value was multiplied by the weight 0 of a lane that does not see its key
    bint careful                    # such values are looked at first: NaN and Inf stay with those who see them
    Ahead later
    Stage stage                     # what this walk over the blocks is for
    uint64_t nan_rows               # lanes whose weights are NaN
    int64_t chunk
    # scratch; few: Qt is Q [LANES][D'] and Ot is O [LANES][Dv'], of whole vectors
    real* Qt
    real* S
    real* Ot
    real* m
    real* l
    real* c
    real* before                    # l as it was before the block
    real* base                      # m, or 0 where it is -inf
    real* total                     # [CHAINS][LANES] sums of the block's weights
    real* level                     # of weights that are no softmax: normalizers.pxi
    real* listed                    # [LANES][LISTED] scores that may be above a row's threshold
    int64_t* n_listed
    uint64_t many                   # lanes whose list is of no use
    real* bias_tile                 # [BLOCK][LANES]
    real* lines                     # [VL][BLOCK] rows of a bias
    real* across                    # [BLOCK][VL] a block's weights, reduced over vectors of queries
    real* top                       # [LANES][k] the largest scores of each lane, descending
    int64_t* top_at                 # and their keys
    real* packed_k                  # [BLOCK][D] keys and [BLOCK][Dv] values of a block, where they are not read in place
    real* packed_v
    # few rows
    real* Ob                        # [LANES][Dv'] what a block adds to O
    real* sums                      # [SCORES] P of a tile of rows
    int64_t* k_at                   # [2][ROOM + 1] bytes to the rows of a block and to those behind; whose they are
    int64_t* v_at
    Late* late
    Back* back                      # of gradients


cdef inline int64_t lead_offset(const fastattn_problem* p, const int64_t* strides, int64_t b) noexcept nogil:
    cdef int64_t at = 0
    cdef int axis
    for axis in range(p.n_lead - 1, -1, -1):
        at += b % p.lead[axis]*strides[axis]
        b //= p.lead[axis]
    return at


cdef inline int64_t offset(const fastattn_problem* p, const fastattn_array* a, int64_t b, int64_t h,
                           const int64_t* cu) noexcept nogil:
    # Of the first row of a batch and head; cu: where the batches of packed rows begin, or NULL.
    return h*a.head + lead_offset(p, a.lead, b) + (cu[b]*a.row if cu != NULL else 0)


cdef inline int64_t lane_at(const Task* t, const fastattn_array* a, Py_ssize_t i) noexcept nogil:
    # Elements from row 0 of the task's first head to the row of lane i < n_queries.
    if t.heads == 1:
        return (t.q_begin + i)*a.row
    return i // t.each*a.head + (t.q_begin + i % t.each)*a.row


cdef inline bint even_lanes(const Task* t, const fastattn_array* a, Py_ssize_t* row) noexcept nogil:
    # Whether the rows of successive lanes lie equally far apart, and how far.
    row[0] = a.row if t.heads == 1 or t.each > 1 else a.head
    return t.heads == 1 or t.each == 1 or a.head == t.each*a.row


cdef inline Py_ssize_t even_rows(const Task* t, const fastattn_array* a, int64_t key, int64_t n, int64_t* first) noexcept nogil:
    # How many of n keys from `key` on have rows at equal distances, and the elements to the first of them; of pages without
    # visible keys, to somewhere inside.
    cdef int64_t index
    first[0] = key*a.row
    if t.pages == NULL:
        return n
    index = key // t.p.page
    key -= index*t.p.page
    first[0] = max(t.pages[index], <int32_t>0)*a.lead[0] + key*a.row
    return min(n, t.p.page - key)


cdef inline int64_t key_at(const Task* t, const fastattn_array* a, int64_t key) noexcept nogil:
    # elements from the array's begin to the row of a key
    cdef int64_t at
    even_rows(t, a, key, 1, &at)
    return at


cdef void intervals(Task* t, int64_t n_keys) noexcept nogil:
    # Causal, window and lengths are one interval a lane. Lanes past the last query repeat it, so that they never make a
    # full tile partial; an empty lane has lo = hi = 0.
    cdef const fastattn_problem* p = t.p
    cdef int64_t at, lo, hi
    cdef int64_t first = p.query_offset[t.b] if p.query_offset != NULL else p.offset
    cdef Py_ssize_t i
    cdef Py_ssize_t row = 0
    cdef bint past
    t.k_begin = n_keys
    t.k_end = 0
    t.full_begin = 0
    t.full_end = n_keys
    for i in range(t.n_queries):
        at = t.q_begin + row
        row = row + 1 if row + 1 < t.each else 0
        if p.rows != NULL:
            at = p.rows[at]
        past = p.rows != NULL and p.query_lengths != NULL and at >= p.query_lengths[t.b]
        at += first
        lo = max(<int64_t>0, at - p.left)
        hi = min(n_keys, at + p.right + 1)
        if lo >= hi or past:
            lo = 0
            hi = 0
        t.lo[i] = lo
        t.hi[i] = hi
        t.full_begin = max(t.full_begin, lo)
        t.full_end = min(t.full_end, hi)
        if lo < hi:
            t.k_begin = min(t.k_begin, lo)
            t.k_end = max(t.k_end, hi)
    for i in range(t.n_queries, t.vectors*VL):
        t.lo[i] = lo
        t.hi[i] = hi


cdef void hide_masked(Task* t, int64_t block, Py_ssize_t n) noexcept nogil:
    # words[j] &= the lanes i whose mask[i, j] is not 0. Bytes along keys become bits along lanes: eight rows make a row of
    # bytes, eight of those a row of words.
    cdef Py_ssize_t col = t.p.mask.col
    cdef const uint8_t* mask = t.mask + block*col
    cdef const uint8_t* line
    cdef uint8_t octets[8][BLOCK]
    cdef uint8_t packed[BLOCK]
    cdef uint8_t* octet
    cdef uint8_t bit
    cdef Py_ssize_t i, j
    if t.p.mask.row == 0 and (t.heads == 1 or t.p.mask.head == 0):
        for j in range(n):
            if mask[j*col] == 0:
                t.words[j] = 0
        return
    memset(octets, 0, sizeof(octets))
    for i in range(t.vectors*VL):
        line = mask + lane_at(t, &t.p.mask, min(i, t.n_queries - 1))
        if col != 1:
            for j in range(n):
                packed[j] = line[j*col]
            line = packed
        octet = octets[i//8]
        bit = <uint8_t>(1 << i % 8)
        for j in range(n):
            octet[j] |= bit if line[j] != 0 else 0
    for j in range(n):
        t.words[j] &= (<uint64_t>octets[0][j] | <uint64_t>octets[1][j] << 8 | <uint64_t>octets[2][j] << 16
                       | <uint64_t>octets[3][j] << 24 | <uint64_t>octets[4][j] << 32 | <uint64_t>octets[5][j] << 40
                       | <uint64_t>octets[6][j] << 48 | <uint64_t>octets[7][j] << 56)


cdef bint next_block(Task* t, int64_t* block) noexcept nogil:
    # The first block of keys at or after `block` that a task visits; False behind the last one.
    cdef const fastattn_tiles* tiles = &t.p.tiles
    if tiles.first != NULL:
        while t.tile < t.tile_end and tiles.block[t.tile]*<int64_t>BLOCK < block[0]:
            t.tile += 1
        if t.tile == t.tile_end:
            return False
        block[0] = tiles.block[t.tile]*<int64_t>BLOCK
    elif block[0] >= t.hole_begin and block[0] + BLOCK <= t.hole_end:
        block[0] = t.hole_end - t.hole_end % BLOCK
    return block[0] < t.end


cdef enum Look:
    NOTHING
    PART
    ALL


cdef Look look(Task* t, int64_t block, int64_t end) noexcept nogil:
    # How much of keys [block, end) the lanes see; sets `seen` unless that is all.
    cdef const fastattn_tiles* tiles = &t.p.tiles
    cdef const uint64_t* words = NULL
    cdef Py_ssize_t n = end - block
    cdef Py_ssize_t i, j, begin, stop
    cdef bint full = t.full_begin <= block and t.full_end >= end
    cdef bint hole = t.hole_begin < end and t.hole_end > block
    cdef uint64_t lanes
    cdef uint64_t some = 0
    cdef uint64_t every = t.lanes
    if tiles.first != NULL and tiles.word[t.tile] >= 0:
        words = tiles.words + tiles.word[t.tile]*<int64_t>BLOCK
    if full and t.mask == NULL and words == NULL and not hole:
        t.some = t.lanes
        return ALL
    t.seen = t.words
    if full and t.mask == NULL and not hole and t.lanes == ~<uint64_t>0 and t.heads == 1:
        t.seen = words
    elif full:
        for j in range(n):
            t.words[j] = t.lanes
    else:
        # a bit turns where an interval begins and where it ends
        memset(t.words, 0, n*sizeof(uint64_t))
        for i in range(t.vectors*VL):
            begin = max(t.lo[i] - block, <int64_t>0)
            stop = min(t.hi[i] - block, <int64_t>n)
            if begin < stop:
                t.words[begin] ^= <uint64_t>1 << i
                if stop < n:
                    t.words[stop] ^= <uint64_t>1 << i
        lanes = 0
        for j in range(n):
            lanes ^= t.words[j]
            t.words[j] = lanes
    if t.mask != NULL:
        hide_masked(t, block, n)
    if words != NULL and t.seen != words:
        for j in range(n):
            t.words[j] &= (words[j] >> t.tile_shift & t.tile_rows)*t.repeat
    if hole:
        for j in range(max(<int64_t>0, t.hole_begin - block), min(<int64_t>n, t.hole_end - block)):
            t.words[j] = 0
    for j in range(n):
        some |= t.seen[j]
        every &= t.seen[j]
    t.some |= some
    return NOTHING if some == 0 else ALL if every == t.lanes else PART


cdef bint biased_away(const Task* t, Py_ssize_t i, int64_t j) noexcept nogil:
    cdef const fastattn_problem* p = t.p
    cdef int64_t at
    if t.bias == NULL:
        return False
    if p.bias_rows != NULL:
        at = p.bias_rows[t.q_begin + i] + p.bias_cols[j]
    else:
        at = lane_at(t, &p.bias, i) + j*p.bias.col
    return real_at(t.bias, at, p.bias.kind) < -REAL_MAX


cdef bint sees_any(Task* t, Py_ssize_t i) noexcept nogil:
    # Whether lane i sees a key, in any split, bias included: for the rare row whose weights are all zero.
    cdef int64_t block = t.k_begin - t.k_begin % BLOCK
    cdef int64_t end, j
    cdef Look seen
    t.end = t.k_end
    if t.some >> i & 1 == 0:
        return False
    if t.bias == NULL:
        return True
    t.tile = t.tile_begin
    while next_block(t, &block):
        end = min(t.k_end, block + BLOCK)
        seen = look(t, block, end)
        for j in range(block, end):
            if (seen == ALL or (seen == PART and t.seen[j - block] >> i & 1)) and not biased_away(t, i, j):
                return True
        block += BLOCK
    return False
