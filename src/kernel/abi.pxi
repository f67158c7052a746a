# fastattn.h for Cython: the problem and the table of a kernel build.

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

cdef extern from "fastattn.h" nogil:
    enum: FASTATTN_ABI
    enum: FASTATTN_LEAD
    int64_t FASTATTN_UNBOUNDED
    ctypedef struct fastattn_array:
        void* data
        int64_t lead[8]
        int64_t head, row, col
        int32_t kind
    enum: FASTATTN_REAL
    enum: FASTATTN_F16
    enum: FASTATTN_BF16
    enum: FASTATTN_I8
    enum: FASTATTN_OUTPUT
    enum: FASTATTN_WEIGHTS
    enum: FASTATTN_SUM
    enum: FASTATTN_MAX
    enum: FASTATTN_ENTROPY
    enum: FASTATTN_TOP_K
    enum: FASTATTN_GRADIENT
    enum: FASTATTN_MEAN
    enum: FASTATTN_SOFTMAX
    enum: FASTATTN_SIGMOID
    enum: FASTATTN_RELU
    enum: FASTATTN_SPARSEMAX
    enum: FASTATTN_ENTMAX15
    enum: FASTATTN_DOT
    enum: FASTATTN_LEAKY
    enum: FASTATTN_ADDITIVE
    ctypedef void (*fastattn_score)(void*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, void*) noexcept nogil
    ctypedef void (*fastattn_score_grad)(void*, const void*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                                         void*) noexcept nogil
    enum: FASTATTN_TILE_ROWS
    enum: FASTATTN_TILE_KEYS
    ctypedef struct fastattn_tiles:
        const int64_t* first
        const int32_t* block
        const int32_t* word
        const uint64_t* words
        int64_t lead[8]
        int64_t head
    ctypedef struct fastattn_problem:
        int32_t abi, bits, n_lead
        int64_t lead[8]
        int64_t B, H, Hkv, L, S, D, Dv
        fastattn_array query, key, value, out, lse, bias, mask
        fastattn_tiles tiles
        const int64_t* bias_rows
        const int64_t* bias_cols
        const void* sinks
        const int64_t* cu_q
        const int64_t* cu_k
        const int32_t* pages
        const int64_t* page_rows
        int64_t page, page_stride
        fastattn_array key_scale, value_scale
        const int64_t* hole_begin
        const int64_t* hole_end
        const int64_t* query_offset
        int64_t offset
        const int64_t* query_lengths
        const int64_t* kv_lengths
        int64_t left, right
        double scale, softcap
        int32_t normalizer
        double shift
        int32_t score
        const void* w
        const void* w_bias
        void* grad_w
        fastattn_score score_mod
        fastattn_score_grad score_grad
        void* score_data
        uint64_t seed
        uint32_t dropout
        double keep
        int32_t one_path
        int32_t reduce
        int64_t k, chunks
        const int64_t* rows
        fastattn_array result, indices
        fastattn_array grad_out, grad_lse, grad_query, grad_key, grad_value, grad_bias, row_grad, delta
        const int64_t* grad_rows
        const int64_t* grad_cols
        int64_t parts
        int32_t fresh
        int64_t in_turn
        int64_t blocks, splits, together, batch_tasks, groups, record
        void* state
        int* stop
        void (*poll)(void*) noexcept nogil
        void* poll_data
    ctypedef struct fastattn_tokens:
        int64_t B, H, L, D, Dv, page
        fastattn_array key, value, key_pool, value_pool, key_scale, value_scale
        const int64_t* slots
        const int64_t* counts
        const int64_t* first
        const float* cos
        const float* sin
        int64_t pairs
        int32_t interleaved
    enum: FASTATTN_GRAPH_OUTPUT
    enum: FASTATTN_GRAPH_GRADIENT
    enum: FASTATTN_GRAPH_SUM
    enum: FASTATTN_GRAPH_SCORES
    enum: FASTATTN_GRAPH_LEVELS
    enum: FASTATTN_GRAPH_DELTA
    ctypedef struct fastattn_graph:
        int32_t mode, score, normalizer, wide
        int64_t n_rows, n_edges, n_tasks, H, Hkv, D, Dv
        fastattn_array query, key, value, out, edge_bias, edge_key, edge_value, lse, delta, grad_out, grad_query, w
        const int64_t* begin
        const int64_t* end
        const int64_t* rows
        const int64_t* order
        const int64_t* cuts
        const void* source
        const void* sinks
        void* weights
        void* grad_scores
        void* grad_bias
        void* grad_w
        int64_t longest
        const double* counts
        void* scores
        int64_t n_scores
        const int64_t* first_score
        double* pairs
        double scale, softcap, slope, keep, offset
        uint64_t seed
        uint32_t dropout
    enum: FASTATTN_LINEAR_OUTPUT
    enum: FASTATTN_LINEAR_QUERY
    enum: FASTATTN_LINEAR_KEY
    enum: FASTATTN_LINEAR_ELU
    enum: FASTATTN_LINEAR_RELU
    enum: FASTATTN_LINEAR_RANDOM
    enum: FASTATTN_LINEAR_WALK
    enum: FASTATTN_LINEAR_SUMS
    enum: FASTATTN_LINEAR_PREFIX
    enum: FASTATTN_LINEAR_ROWS
    enum: FASTATTN_LINEAR_SEGMENT
    ctypedef struct fastattn_linear:
        int32_t mode, map, phase, causal, n_lead
        int64_t lead[8]
        int64_t B, H, Hkv, L, S, D, Dv, F, wide, segments, row_segments
        fastattn_array query, key, value, out, normalizer, grad_out, grad_query, grad_key, grad_value
        const void* projection
        const void* shift
        double half
        const int64_t* kv_lengths
        const void* begin
        void* end
        void* sums
    enum: FASTATTN_IDENTITY
    enum: FASTATTN_RELU_LAYER
    enum: FASTATTN_GELU
    enum: FASTATTN_GELU_TANH
    enum: FASTATTN_SILU
    ctypedef struct fastattn_layer:
        int64_t M, N, K
        fastattn_array x, out
        const void* panels
        int32_t kind
        const void* bias
        int32_t activation
        int64_t row_blocks, column_blocks
    enum: FASTATTN_NORM_ROWS
    ctypedef struct fastattn_norm:
        int64_t M, N
        fastattn_array x, add, sum, out
        const void* weight
        const void* bias
        double eps
        int32_t centre
    ctypedef struct fastattn_kernel:
        int32_t abi, bits
        int64_t lanes, vector
        int64_t (*tasks)(fastattn_problem*, int64_t) noexcept nogil
        size_t (*state)(const fastattn_problem*) noexcept nogil
        size_t (*scratch)(const fastattn_problem*) noexcept nogil
        void (*run)(const fastattn_problem*, int64_t, int64_t, int32_t, void*) noexcept nogil
        void (*store)(const fastattn_tokens*, void*) noexcept nogil
        size_t (*graph_scratch)(const fastattn_graph*) noexcept nogil
        void (*graph)(const fastattn_graph*, int64_t, void*) noexcept nogil
        size_t (*linear_scratch)(const fastattn_linear*) noexcept nogil
        void (*linear)(const fastattn_linear*, int64_t, void*) noexcept nogil
        void (*pack)(const fastattn_array*, int64_t, int64_t, int32_t, void*, void*) noexcept nogil
        int64_t (*layer_tasks)(fastattn_layer*, int64_t) noexcept nogil
        size_t (*layer_scratch)(const fastattn_layer*) noexcept nogil
        void (*layer)(const fastattn_layer*, int64_t, void*) noexcept nogil
        size_t (*norm_scratch)(const fastattn_norm*) noexcept nogil
        void (*norm)(const fastattn_norm*, int64_t, void*) noexcept nogil
        void (*exp2)(const void*, void*, int64_t) noexcept nogil
        void (*tanh)(const void*, void*, int64_t) noexcept nogil
        double (*peak)(int64_t) noexcept nogil
        double (*read)(const void*, int64_t) noexcept nogil
