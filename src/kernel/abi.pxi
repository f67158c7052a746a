# fastattn.h for Cython: the problem and the table of a kernel build.

from libc.stdint cimport int32_t, int64_t

cdef extern from "fastattn.h" nogil:
    enum: FASTATTN_ABI
    enum: FASTATTN_LEAD
    int64_t FASTATTN_UNBOUNDED
    ctypedef struct fastattn_array:
        void* data
        int64_t lead[8]
        int64_t head, row, col
    ctypedef struct fastattn_problem:
        int32_t abi, bits, n_lead
        int64_t lead[8]
        int64_t B, H, Hkv, L, S, D, Dv
        fastattn_array query, key, value, out, lse, bias, mask
        const void* sinks
        const int64_t* query_offset
        int64_t offset
        const int64_t* query_lengths
        const int64_t* kv_lengths
        int64_t left, right
        double scale, softcap
        int* stop
        void (*poll)(void*) noexcept nogil
        void* poll_data
    ctypedef struct fastattn_kernel:
        int32_t abi, bits
        int64_t lanes, vector
        int64_t (*tasks)(const fastattn_problem*, int64_t) noexcept nogil
        size_t (*scratch)(const fastattn_problem*) noexcept nogil
        void (*run)(const fastattn_problem*, int64_t, int64_t, int32_t, void*) noexcept nogil
        void (*exp2)(const void*, void*, int64_t) noexcept nogil
        void (*tanh)(const void*, void*, int64_t) noexcept nogil
        double (*peak)(int64_t) noexcept nogil
