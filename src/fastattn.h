/* The one description of an attention problem, and the table that a build of the kernel offers.
 *
 * Sizes are counts, strides are in elements (bytes for the mask, whose elements are bytes), a stride of 0 broadcasts.
 * The batch is up to FASTATTN_LEAD leading axes; every array brings a stride for each of them.
 * `real` below is double where `bits` is 64, else float: all sums and the softmax are in it. Arrays of a narrower kind are
 * widened when they are read and rounded to nearest, ties to even, when they are written.
 */
#ifndef FASTATTN_H
#define FASTATTN_H

#include <stddef.h>
#include <stdint.h>

#define FASTATTN_ABI 7
#define FASTATTN_LEAD 8
#define FASTATTN_UNBOUNDED ((int64_t)1 << 61)

/* How the elements of an array are stored. */
enum {
    FASTATTN_REAL,
    FASTATTN_F16,                   /* IEEE binary16 */
    FASTATTN_BF16,                  /* the upper half of a binary32 */
    FASTATTN_I8,                    /* integers, times the scale of their row: key and value only */
};

typedef struct {
    void *data;                     /* NULL: the array is not given */
    int64_t lead[FASTATTN_LEAD];    /* strides of the leading axes */
    int64_t head, row, col;
    int32_t kind;
} fastattn_array;

/* A mask as tiles of FASTATTN_TILE_ROWS queries x FASTATTN_TILE_KEYS keys. Lists of tiles, one for each batch and head or shared
 * by stride 0: group g of list n (G groups a list) holds tiles first[n G + g] to first[n G + g + 1] - 1, their block of keys
 * ascending. A tile whose word is negative is seen in full; else bit i of words[word][j] says whether row i sees key j. */
#define FASTATTN_TILE_ROWS 64
#define FASTATTN_TILE_KEYS 96
typedef struct {
    const int64_t *first;           /* NULL: no such mask */
    const int32_t *block, *word;
    const uint64_t *words;          /* FASTATTN_TILE_KEYS for each */
    int64_t lead[FASTATTN_LEAD];    /* strides in lists */
    int64_t head;
} fastattn_tiles;

enum {
    FASTATTN_DOT,                   /* query . key */
    FASTATTN_LEAKY,                 /* w . leaky(query + key): x, or slope x where x < 0 */
    FASTATTN_ADDITIVE,              /* w . tanh(query + key + w_bias) */
};

enum {
    FASTATTN_OUTPUT,                /* softmax(scores) value */
    FASTATTN_WEIGHTS,               /* (B, H, L, S) the weights themselves; the result holds zeros before */
    FASTATTN_SUM,                   /* (B, H, chunks, S) their sum over the queries of each chunk; zeros before */
    FASTATTN_MAX,                   /* (B, H, chunks, S) their maximum; zeros before */
    FASTATTN_ENTROPY,               /* (B, H, L, 1) -sum p log p of each row, in nats; zeros before */
    FASTATTN_TOP_K,                 /* (B, H, L, k) the largest of each row, descending; zeros before, and indices -1 */
    FASTATTN_GRADIENT,              /* the gradients, from grad_out and the saved out and lse */
    FASTATTN_MEAN,                  /* out = sum g value / sum g, g the slopes of the weights, from the saved lse: what takes the
                                     * place of out in the gradients of sparsemax and entmax-1.5 */
};

/* Changes a tile of scores: element j * stride + i belongs to query + i and key + j of a batch and head. Called from any thread.
 * The other turns gradients of the changed scores into those of the scores as they were. */
typedef void (*fastattn_score)(void *scores, int64_t batch, int64_t head, int64_t query, int64_t key, int64_t n_queries,
                               int64_t n_keys, int64_t stride, void *data);
typedef void (*fastattn_score_grad)(void *grads, const void *scores, int64_t batch, int64_t head, int64_t query, int64_t key,
                                    int64_t n_queries, int64_t n_keys, int64_t stride, void *data);

/* What makes weights p of a row's final logits s; S keys, of which the row may see fewer. */
enum {
    FASTATTN_SOFTMAX,               /* exp(s) / sum exp(s) */
    FASTATTN_SIGMOID,               /* 1 / (1 + exp(-(s + shift))) */
    FASTATTN_RELU,                  /* max(s, 0) / S */
    FASTATTN_SPARSEMAX,             /* max(s - t, 0), t such that their sum is 1; lse is t */
    FASTATTN_ENTMAX15,              /* max(s / 2 - t, 0)^2, likewise */
};

typedef struct {
    int32_t abi;
    int32_t bits;                   /* 64, 32, or 16: float32 whose products take pairs of bfloat16; then query, key and value
                                     * are FASTATTN_BF16, D is even and scale > 0 */
    int32_t n_lead;
    int64_t lead[FASTATTN_LEAD];    /* leading sizes; their product is B */
    int64_t B, H, Hkv, L, S, D, Dv;
    fastattn_array query;           /* (B, H, L, D) */
    fastattn_array key;             /* (B, Hkv, S, D) */
    fastattn_array value;           /* (B, Hkv, S, Dv) */
    fastattn_array out;             /* (B, H, L, Dv) */
    fastattn_array lse;             /* (B, H, L), natural logarithm; optional */
    fastattn_array bias;            /* (B, H, L, S) real; optional */
    const int64_t *bias_rows, *bias_cols;   /* (L,) and (S,): query i and key j read element rows[i] + cols[j] of
                                             * their head's bias instead; NULL: by strides */
    fastattn_array mask;            /* (B, H, L, S) bytes, nonzero = attend; optional */
    fastattn_tiles tiles;           /* optional */
    const void *sinks;              /* (H,) real; optional */
    const int64_t *cu_q, *cu_k;     /* (B + 1,): batch b is rows cu[b] to cu[b + 1] - 1 of packed arrays, whose leading strides
                                     * are 0, and L and S are the longest; NULL: arrays of L and S rows */
    const int32_t *pages;           /* paged keys and values: key j of batch b is row j % page of page table[j / page], where
                                     * table = pages + page_rows[b] * page_stride; lead[0] of key and value is the stride of a
                                     * page. Negative numbers: pages without visible keys. NULL: not paged */
    const int64_t *page_rows;       /* (B,) */
    int64_t page, page_stride;
    fastattn_array key_scale, value_scale;      /* of FASTATTN_I8: (B, Hkv, S) float32; strides as key's, paged as key is */
    const int64_t *hole_begin, *hole_end;       /* (B,): keys in [begin, end) are seen by nobody; NULL: none */
    const int64_t *query_offset;    /* (B,); NULL stands for `offset` */
    int64_t offset;
    const int64_t *query_lengths;   /* (B,); NULL stands for L */
    const int64_t *kv_lengths;      /* (B,); NULL stands for S */
    int64_t left, right;            /* row i sees p - left <= j <= p + right, p = i + query_offset */
    double scale, softcap;          /* softcap 0: none */
    int32_t normalizer;             /* all but the first take one_path, and no pairs */
    double shift;                   /* NaN: -log of the batch's keys */
    int32_t score;                  /* FASTATTN_DOT or FASTATTN_ADDITIVE, which takes one_path, no pairs and scale 1 */
    const void *w, *w_bias;         /* (H, D) real: of additive scores; w_bias is optional */
    void *grad_w;                   /* (B, H, parts, D) real, zeros before: for each of the parts of the keys; optional */
    fastattn_score score_mod;       /* of scaled scores; optional; it takes one_path and no pairs */
    fastattn_score_grad score_grad;
    void *score_data;
    uint64_t seed;
    uint32_t dropout;               /* a weight stays if its number is at least this; 0: none */
    double keep;                    /* factor of those that stay */
    int32_t one_path;               /* the same bits whatever the number of rows: never the path for few of them */
    int32_t reduce;                 /* what to compute: FASTATTN_OUTPUT, or of the weights ... */
    int64_t k;                      /* largest weights of a row, for FASTATTN_TOP_K */
    int64_t chunks;                 /* parts of the rows that are summed apart */
    const int64_t *rows;            /* (L,) the row that each query is in positions and query_lengths; NULL: its index */
    fastattn_array result;          /* of the weights: see the enum; the last axis contiguous */
    fastattn_array indices;         /* (B, H, L, k) int64 */
    fastattn_array grad_out;        /* (B, H, L, Dv), of out's kind */
    fastattn_array grad_lse;        /* (B, H, L) real; optional */
    fastattn_array grad_query, grad_key, grad_value;        /* real; col is 1 */
    fastattn_array grad_bias;       /* (B, H, L, S) real, stride 0 where it is summed; zeros before, if not `fresh`; optional */
    const int64_t *grad_rows, *grad_cols;   /* (L,) and (S,): query i and key j add to element rows[i] + cols[j] of a head of
                                             * grad_bias instead, of which each chunk of the keys has a part, `row` apart */
    fastattn_array row_grad;        /* (B, H, L) sums over the keys of the logits' gradients; zeros before; optional */
    fastattn_array delta;           /* (B, H, L) sum of grad_out * out, less grad_lse */
    int64_t parts;                  /* of grad_bias by grad_rows, of grad_w */
    int32_t fresh;                  /* grad_bias holds anything before; it has its own rows, heads, and batches or one for all */
    int64_t in_turn;                /* pairs of key head and batch that one task takes, whose grad_bias is one sum */
    int64_t blocks, splits, together, batch_tasks, groups, record;  /* set by `tasks`: how the problem is cut, see tasks.pxi */
    void *state;                    /* what `state` asks for; its first groups * 8 bytes 0 */
    volatile int *stop;             /* set to nonzero to abandon the call; may be NULL */
    void (*poll)(void *);           /* called now and then by the calling thread; may be NULL */
    void *poll_data;
} fastattn_problem;

/* New tokens of a cache: keys and values (B, H, L, .) into the pages of pools, whose leading stride is that of a page. */
typedef struct {
    int64_t B, H, L, D, Dv, page;
    fastattn_array key, value;
    fastattn_array key_pool, value_pool;
    fastattn_array key_scale, value_scale;      /* float32, of pools of FASTATTN_I8 */
    const int64_t *slots;           /* page number * page + place of each token that counts, batch by batch */
    const int64_t *counts;          /* (B,) tokens that count; NULL: L */
    const int64_t *first;           /* (B,) position of token 0 */
    const float *cos, *sin;         /* (positions, pairs): rotary embedding of the keys */
    int64_t pairs;                  /* 0: none */
    int32_t interleaved;            /* pairs are features (2 i, 2 i + 1), else (i, i + pairs) */
} fastattn_tokens;

/* Attention along the edges of a graph: row i of `begin` and `end` is the target rows[i], with those edges. Arrays of nodes
 * (n, H or Hkv, columns) use `row`, `head` and `col`; so do those of edges, whose rows are order[e]. */
enum {
    FASTATTN_GRAPH_OUTPUT,          /* out and lse of row i */
    FASTATTN_GRAPH_GRADIENT,        /* grad_query of row i; weights, grad_scores and grad_bias of its edges */
    FASTATTN_GRAPH_SUM,             /* out of row i = sum of weights * value over its edges and the query heads of a key head */
    /* Rows that are done in parts, sparsemax and entmax: */
    FASTATTN_GRAPH_SCORES,          /* scores of row i */
    FASTATTN_GRAPH_LEVELS,          /* pairs of scores [begin[i], end[i]) of a head: their maximum, and the threshold from it */
    FASTATTN_GRAPH_DELTA,           /* pairs of row i: sums of w dP and w, whose quotient over the target is its delta */
};

typedef struct {
    int32_t mode, score, normalizer, wide;      /* wide: sources are int64_t, else int32_t */
    int64_t n_rows, n_edges, n_tasks, H, Hkv, D, Dv;
    fastattn_array query, key, value, out;
    fastattn_array edge_bias, edge_key, edge_value;     /* optional; (E, H), (E, Hkv, D), (E, Hkv, Dv) */
    fastattn_array lse, delta, grad_out, grad_query;    /* (n, H) real; lse is optional in the forward pass: t, or 0 */
    fastattn_array w;               /* (H, D): `head` and `col` */
    const int64_t *begin, *end, *rows, *order, *cuts;   /* rows, order: NULL for 0, 1, 2 ...; cuts: (n_tasks + 1) rows */
    const void *source;
    const void *sinks;              /* (H,) real; optional */
    void *weights, *grad_scores, *grad_bias;            /* (E, H) real, contiguous */
    void *grad_w;                   /* (n_tasks, H, D up to a multiple of 16) real, zeros before; optional */
    int64_t longest;                /* most edges of a row */
    const double *counts;           /* (n_rows, H) edges that count of the whole target; NULL: rows are whole */
    void *scores;                   /* (H, n_scores) real: of rows in parts, -inf for edges that don't count; else NULL */
    int64_t n_scores;
    const int64_t *first_score;     /* (n_rows) of a head */
    double *pairs;                  /* (n_rows, H, 2), of LEVELS (n_tasks, 2) */
    double scale, softcap, slope, keep;
    double offset;                  /* of FASTATTN_SIGMOID; NaN: -log of the edges that count */
    uint64_t seed;
    uint32_t dropout;
} fastattn_graph;

/* Linear attention (see linear.pxi). A state is (F, wide) real: sum of features x [value, 1], zeros behind. */
enum {
    FASTATTN_LINEAR_OUTPUT,         /* out, and the normalizer if it is given */
    FASTATTN_LINEAR_QUERY,          /* grad_query, from grad_out, out and the normalizer */
    FASTATTN_LINEAR_KEY,            /* grad_key and grad_value */
};
enum {
    FASTATTN_LINEAR_ELU,            /* elu(x) + 1 */
    FASTATTN_LINEAR_RELU,           /* max(x, 0) */
    FASTATTN_LINEAR_RANDOM,         /* 2^(projection . x ...), see random_features */
};
enum {
    FASTATTN_LINEAR_WALK,           /* all of a key head: B * Hkv tasks; or in three phases, with `sums`: */
    FASTATTN_LINEAR_SUMS,           /* B * Hkv * segments tasks */
    FASTATTN_LINEAR_PREFIX,         /* B * Hkv tasks */
    FASTATTN_LINEAR_ROWS,           /* B * Hkv * row_segments tasks */
};

#define FASTATTN_LINEAR_SEGMENT 2048    /* rows that are summed from zero */

typedef struct {
    int32_t mode, map, phase, causal, n_lead;
    int64_t lead[FASTATTN_LEAD];
    int64_t B, H, Hkv, L, S, D, Dv, F, wide;        /* wide: Dv + 1 up to a multiple of 16 */
    int64_t segments, row_segments; /* of the rows that join the state, and that read it */
    fastattn_array query, key, value, out;
    fastattn_array normalizer;      /* (B, H, L) real; optional for OUTPUT */
    fastattn_array grad_out, grad_query, grad_key, grad_value;
    const void *projection, *shift; /* (F, D) and (F,) real, for RANDOM: in powers of two */
    double half;                    /* half of |key|^2, in powers of two */
    const int64_t *kv_lengths;      /* (B,); NULL stands for S */
    const void *begin;              /* (B, Hkv) states that the keys are added to; NULL: zeros */
    void *end;                      /* (B, Hkv) states behind the last key; optional */
    void *sums;                     /* (B, Hkv, segments + 1) states */
} fastattn_linear;

/* A linear layer, out = activation(x W^T + bias), whose weight is in panels that `pack` has made. */
enum {
    FASTATTN_IDENTITY,
    FASTATTN_RELU_LAYER,            /* max(x, 0) */
    FASTATTN_GELU,                  /* x times the normal distribution function of x */
    FASTATTN_GELU_TANH,             /* the same approximated by tanh */
    FASTATTN_SILU,                  /* x / (1 + exp(-x)) */
};

typedef struct {
    int64_t M, N, K;                /* rows, outputs, inputs; K is even for pairs */
    fastattn_array x, out;          /* (M, K) and (M, N): `row` and `col` */
    const void *panels;             /* outputs up to a multiple of `lanes`, zeros behind: [.][K][lanes] of `kind`, or pairs */
    int32_t kind;                   /* of panels: FASTATTN_REAL or FASTATTN_BF16 */
    const void *bias;               /* (N,) real; optional */
    int32_t activation;
    int64_t row_blocks, column_blocks;      /* set by layer_tasks */
} fastattn_layer;

/* Rows of mean 0 and variance 1, or without `centre` of mean square 1: (x + add - mean) / sqrt(variance + eps) weight + bias. */
enum { FASTATTN_NORM_ROWS = 64 };   /* of a task */

typedef struct {
    int64_t M, N;
    fastattn_array x, add, sum, out;        /* (M, N): `row` and `col`; add is optional, and with it sum, which gets x + add */
    const void *weight, *bias;              /* (N,) real; optional */
    double eps;
    int32_t centre;
} fastattn_norm;

typedef struct {
    int32_t abi, bits;
    int64_t lanes;                                                  /* queries of the widest block */
    int64_t vector;                                                 /* queries of a vector */
    int64_t (*tasks)(fastattn_problem *, int64_t threads);          /* cuts the problem: the number of independent tasks */
    size_t (*state)(const fastattn_problem *);                      /* bytes that the tasks share, once it is cut; may be 0 */
    size_t (*scratch)(const fastattn_problem *);                    /* bytes a thread needs, 64-byte aligned */
    void (*run)(const fastattn_problem *, int64_t n_tasks, int64_t task, int32_t caller, void *scratch);
    void (*store)(const fastattn_tokens *, void *memory);           /* memory: 64 + max(D, Dv) reals */
    size_t (*graph_scratch)(const fastattn_graph *);
    void (*graph)(const fastattn_graph *, int64_t task, void *scratch);
    size_t (*linear_scratch)(const fastattn_linear *);
    void (*linear)(const fastattn_linear *, int64_t task, void *scratch);
    void (*pack)(const fastattn_array *weight, int64_t N, int64_t K, int32_t kind, void *panels, void *memory);    /* (N, K): `row`
                                                                     * and `col`; memory: K * lanes reals */
    int64_t (*layer_tasks)(fastattn_layer *, int64_t threads);
    size_t (*layer_scratch)(const fastattn_layer *);
    void (*layer)(const fastattn_layer *, int64_t task, void *scratch);
    size_t (*norm_scratch)(const fastattn_norm *);
    void (*norm)(const fastattn_norm *, int64_t task, void *scratch);
    void (*exp2)(const void *x, void *y, int64_t n);                /* the kernel's own exponential, for its test */
    void (*tanh)(const void *x, void *y, int64_t n);
    double (*peak)(int64_t rounds);                                 /* floating-point operations done, all in registers */
    double (*read)(const void *, int64_t bytes);                    /* loads them all: what decoding is measured against */
} fastattn_kernel;

#endif
