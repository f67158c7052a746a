/* The one description of an attention problem, and the table that a build of the kernel offers.
 *
 * Sizes are counts, strides are in elements (bytes for the mask, whose elements are bytes), a stride of 0 broadcasts.
 * The batch is up to FASTATTN_LEAD leading axes; every array brings a stride for each of them.
 * `real` below is float or double, as `bits` says.
 */
#ifndef FASTATTN_H
#define FASTATTN_H

#include <stddef.h>
#include <stdint.h>

#define FASTATTN_ABI 2
#define FASTATTN_LEAD 8
#define FASTATTN_UNBOUNDED ((int64_t)1 << 61)

typedef struct {
    void *data;                     /* NULL: the array is not given */
    int64_t lead[FASTATTN_LEAD];    /* strides of the leading axes */
    int64_t head, row, col;
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
    FASTATTN_OUTPUT,                /* softmax(scores) value */
    FASTATTN_WEIGHTS,               /* (B, H, L, S) the weights themselves; the result holds zeros before */
    FASTATTN_SUM,                   /* (B, H, chunks, S) their sum over the queries of each chunk; zeros before */
    FASTATTN_MAX,                   /* (B, H, chunks, S) their maximum; zeros before */
    FASTATTN_ENTROPY,               /* (B, H, L, 1) -sum p log p of each row, in nats; zeros before */
    FASTATTN_TOP_K,                 /* (B, H, L, k) the largest of each row, descending; zeros before, and indices -1 */
};

typedef struct {
    int32_t abi, bits;
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
    const int64_t *query_offset;    /* (B,); NULL stands for `offset` */
    int64_t offset;
    const int64_t *query_lengths;   /* (B,); NULL stands for L */
    const int64_t *kv_lengths;      /* (B,); NULL stands for S */
    int64_t left, right;            /* row i sees p - left <= j <= p + right, p = i + query_offset */
    double scale, softcap;          /* softcap 0: none */
    int32_t reduce;                 /* what to compute: FASTATTN_OUTPUT, or of the weights ... */
    int64_t k;                      /* largest weights of a row, for FASTATTN_TOP_K */
    int64_t chunks;                 /* parts of the rows that are summed apart */
    const int64_t *rows;            /* (L,) the row that each query is in positions and query_lengths; NULL: its index */
    fastattn_array result;          /* of the weights: see the enum; the last axis contiguous */
    fastattn_array indices;         /* (B, H, L, k) int64 */
    volatile int *stop;             /* set to nonzero to abandon the call; may be NULL */
    void (*poll)(void *);           /* called now and then by the calling thread; may be NULL */
    void *poll_data;
} fastattn_problem;

typedef struct {
    int32_t abi, bits;
    int64_t lanes;                                                  /* queries of the widest block */
    int64_t vector;                                                 /* queries of a vector */
    int64_t (*tasks)(const fastattn_problem *, int64_t threads);    /* number of independent tasks */
    size_t (*scratch)(const fastattn_problem *);                    /* bytes a thread needs, 64-byte aligned */
    void (*run)(const fastattn_problem *, int64_t n_tasks, int64_t task, int32_t caller, void *scratch);
    void (*exp2)(const void *x, void *y, int64_t n);                /* the kernel's own exponential, for its test */
    void (*tanh)(const void *x, void *y, int64_t n);
    double (*peak)(int64_t rounds);                                 /* floating-point operations done, all in registers */
} fastattn_kernel;

#endif
