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

#define FASTATTN_ABI 1
#define FASTATTN_LEAD 8
#define FASTATTN_UNBOUNDED ((int64_t)1 << 61)

typedef struct {
    void *data;                     /* NULL: the array is not given */
    int64_t lead[FASTATTN_LEAD];    /* strides of the leading axes */
    int64_t head, row, col;
} fastattn_array;

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
    fastattn_array mask;            /* (B, H, L, S) bytes, nonzero = attend; optional */
    const void *sinks;              /* (H,) real; optional */
    const int64_t *query_offset;    /* (B,); NULL stands for `offset` */
    int64_t offset;
    const int64_t *query_lengths;   /* (B,); NULL stands for L */
    const int64_t *kv_lengths;      /* (B,); NULL stands for S */
    int64_t left, right;            /* row i sees p - left <= j <= p + right, p = i + query_offset */
    double scale, softcap;          /* softcap 0: none */
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
