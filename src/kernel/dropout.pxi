# Dropout of weights, by numbers that depend on nothing but (seed, batch, head, row, key): philox.h.

cdef extern from "philox.h" nogil:
    void v_kept(unsigned int group, unsigned int row, unsigned int head, unsigned int batch, uint64_t seed, unsigned int below,
                int rows, uint64_t* kept)


cdef void kept_lanes(const Task* t, int first, int vectors, int64_t key, Py_ssize_t n, uint64_t* words) noexcept nogil:
    # words[j]: the lanes of the segment whose weights of key + j stay
    cdef uint64_t kept[4]
    cdef int64_t group, j
    cdef int r
    for group in range(key//4, (key + n + 3)//4):
        v_kept(<unsigned int>group, <unsigned int>(t.q_begin + first*VL), <unsigned int>t.h, <unsigned int>t.b, t.p.seed,
               t.p.dropout, vectors*VL, kept)
        for r in range(4):
            j = 4*group + r - key
            if 0 <= j < n:
                words[j] = kept[r] << first*VL


cdef void drop_weights(Task* t, int first, int vectors, int64_t block, const Parts* parts) noexcept nogil:
    # P = 0 where it does not stay
    cdef uint64_t words[BLOCK]
    cdef real* P
    cdef Py_ssize_t j
    cdef int g, part
    for part in range(parts.n):
        kept_lanes(t, first, vectors, block + parts.begin[part], parts.end[part] - parts.begin[part], words)
        for j in range(parts.begin[part], parts.end[part]):
            P = t.S + j*LANES
            for g in range(first, first + vectors):
                v_store(P + g*VL, v_keep(v_load(P + g*VL), words[j - parts.begin[part]] >> g*VL))
