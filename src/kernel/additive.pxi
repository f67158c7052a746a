# Additive scores (Bahdanau, Cho and Bengio 2015), and what their gradients have in the place of products. Lanes are queries
# as everywhere; Qt has the bias b in it; nothing of queries x keys x D is stored, so each tanh is computed where it is used.
#
#     S[j]   = sum_d w_d tanh(Qt[d] + K[j, d])
#
#     t      = tanh(Qt[d] + K[j, d]),  u = dS[j] w_d (1 - t^2)
#     dQt[d] += sum_j u      dK[j, d] += sum over lanes of u      dw_d += sum_j and over lanes of dS[j] t

cdef void add_to_queries(Task* t) noexcept nogil:
    # Qt += b
    cdef const fastattn_problem* p = t.p
    cdef const real* b = <const real*>p.w_bias + t.h*p.D
    cdef Py_ssize_t d
    cdef int g
    for d in range(p.D):
        for g in range(t.vectors):
            v_store(t.Qt + d*LANES + g*VL, v_add(v_load(t.Qt + d*LANES + g*VL), v_set1(b[d])))


cdef inline void additive_columns(const int nv, const real* k, Py_ssize_t k_row, const real* Qt, const real* w, Py_ssize_t D,
                                  real* S, Py_ssize_t n) noexcept nogil:
    cdef vf acc[4]
    cdef vf x, wd
    cdef Py_ssize_t j, d
    cdef int g
    for j in range(n):
        for g in range(nv):
            acc[g] = v_zero()
        for d in range(D):
            x = v_set1(k[j*k_row + d])
            wd = v_set1(w[d])
            for g in range(nv):
                acc[g] = v_fma(wd, v_tanh(v_add(v_load(Qt + d*LANES + g*VL), x)), acc[g])
        for g in range(nv):
            v_store(S + j*LANES + g*VL, acc[g])


cdef void additive_scores(const Task* t, int first, int vectors, const real* k, Py_ssize_t k_row, real* S,
                          Py_ssize_t n) noexcept nogil:
    # S of vectors [first, first + vectors) and n keys
    cdef const real* w = <const real*>t.p.w + t.h*t.p.D
    cdef const real* Qt = t.Qt + first*VL
    while vectors >= 4:
        additive_columns(4, k, k_row, Qt, w, t.p.D, S, n)
        Qt += 4*VL
        S += 4*VL
        vectors -= 4
    while vectors >= 2:
        additive_columns(2, k, k_row, Qt, w, t.p.D, S, n)
        Qt += 2*VL
        S += 2*VL
        vectors -= 2
    if vectors == 1:
        additive_columns(1, k, k_row, Qt, w, t.p.D, S, n)


cdef void additive_gradients(Task* t, int first, int vectors, const real* k, Py_ssize_t k_row, const real* dS,
                             const uint64_t* words, Py_ssize_t n, real* dQt, real* dK, Py_ssize_t ldk, real* dW) noexcept nogil:
    # For n keys; words[j]: the lanes whose gradients count. dW: [D][VL].
    cdef const real* w = <const real*>t.p.w + t.h*t.p.D
    cdef const real* Qt = t.Qt + first*VL
    cdef vf one = v_set1(1)
    cdef vf across[VL]          # of successive keys: their sums over lanes come together
    cdef real lanes[VL]
    cdef vf acc[BLOCK_VECTORS]
    cdef vf of_w, dw, x, y, u, s
    cdef Py_ssize_t j, d, i
    cdef int g
    for d in range(t.p.D):
        of_w = v_zero()
        for g in range(vectors):
            acc[g] = v_zero()
        for j in range(n):
            u = dw = v_zero()
            x = v_set1(k[j*k_row + d])
            for g in range(vectors):
                y = v_tanh(v_add(v_load(Qt + d*LANES + g*VL), x))
                s = v_load(dS + j*LANES + g*VL)
                dw = v_add(dw, v_keep(v_mul(s, y), words[j] >> (first + g)*VL))
                y = v_keep(v_mul(s, v_mul(v_sub(one, y), v_add(one, y))), words[j] >> (first + g)*VL)
                acc[g] = v_add(acc[g], y)
                u = v_add(u, y)
            of_w = v_add(of_w, dw)
            across[j % VL] = u
            if j % VL == VL - 1 or j == n - 1:
                for i in range(j % VL + 1, VL):
                    across[i] = v_zero()
                v_store(lanes, v_mul(v_sums(across), v_set1(w[d])))
                for i in range(j % VL + 1):
                    dK[(j - j % VL + i)*ldk + d] += lanes[i]
        for g in range(vectors):
            v_store(dQt + d*LANES + g*VL, v_fma(acc[g], v_set1(w[d]), v_load(dQt + d*LANES + g*VL)))
        v_store(dW + d*VL, v_add(v_load(dW + d*VL), of_w))
