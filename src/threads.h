/* What OpenMP does not say: where workers run, when to look for signals, what the CPU can do. */
#ifndef FASTATTN_THREADS_H
#define FASTATTN_THREADS_H

#ifdef _OPENMP
#include <omp.h>
static inline int fastattn_thread(void) { return omp_get_thread_num(); }
static inline int fastattn_team(void) { return omp_get_num_threads(); }
#else
static inline int fastattn_thread(void) { return 0; }
static inline int fastattn_team(void) { return 1; }
#endif

#include <stdint.h>
#include <string.h>
#include <time.h>

/* Tasks are handed out by one counter. OpenMP's own loop would do, but at its end the caller waits where it can't look for
 * signals, for as long as another thread's last task takes. */
static inline int64_t fastattn_add(int64_t *counter, int64_t n) {
    return __atomic_fetch_add(counter, n, __ATOMIC_ACQ_REL);
}

/* Between two looks at what another thread is about to do. */
#ifdef __linux__
#include <sched.h>
static inline void fastattn_yield(void) { sched_yield(); }
#else
static inline void fastattn_yield(void) {}
#endif

static inline double fastattn_clock(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static inline void fastattn_rest(double seconds) {
    struct timespec t = {0, (long)(1e9 * seconds)};
    nanosleep(&t, NULL);
}

/* Right after a matmul of NumPy its OpenBLAS threads still spin on the other CPUs. The kernel then wakes an OpenMP worker on
 * the CPU of the thread that wakes it, where the caller itself waits at the barrier: two threads on one CPU, for
 * milliseconds. So each worker keeps off the caller's CPU; it is free on all others (pinning would pile processes up). */
#if defined(__linux__) && defined(_OPENMP)
#include <sched.h>
typedef struct { int cpu; cpu_set_t allowed; } fastattn_place;
static inline void fastattn_caller(fastattn_place *place) {
    place->cpu = -1;
    if (sched_getaffinity(0, sizeof place->allowed, &place->allowed) == 0 && CPU_COUNT(&place->allowed) > 1)
        place->cpu = sched_getcpu();
}
static inline void fastattn_keep_off(const fastattn_place *place) {
    static _Thread_local int excluded = -1;
    static _Thread_local cpu_set_t of;
    if (omp_get_thread_num() == 0 || place->cpu < 0 || !CPU_ISSET(place->cpu, &place->allowed)) return;
    if (excluded == place->cpu && CPU_EQUAL(&of, &place->allowed)) return;
    cpu_set_t set = place->allowed;
    CPU_CLR(place->cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set) == 0) { excluded = place->cpu; of = place->allowed; }
}
#else
typedef struct { int cpu; } fastattn_place;
static inline void fastattn_caller(fastattn_place *place) { place->cpu = -1; }
static inline void fastattn_keep_off(const fastattn_place *place) { (void)place; }
#endif

/* Instruction sets by level; the builtins also ask whether the system saves the registers. */
static inline int fastattn_supports(const char *isa) {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
                 && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (strcmp(isa, "avx512_bf16") == 0) return avx512 && __builtin_cpu_supports("avx512bf16");
    if (strcmp(isa, "avx512") == 0) return avx512;
    if (strcmp(isa, "avx2") == 0) return avx2;
#endif
    return strcmp(isa, "baseline") == 0 || strcmp(isa, "neon") == 0 || strcmp(isa, "generic") == 0;
}

#endif
