/* SPDX-License-Identifier: Apache-2.0 */
/*
 * See check.h.  Usage: checks [--only family] [--skip family]... [--seed n] [--list].  Prints one line per family and
 * exits with 0, or prints the first difference and exits with 1.
 */
#include "check.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* build.py writes the table of families. */
struct check_family {
    const char *name;
    void (*run)(void);
};
extern const struct check_family check_families[];

static uint64_t seed = 1, random_state;
static long n_compared;
static const char *family = "";

void check_true(int condition, const char *format, ...) {
    n_compared++;
    if (condition)
        return;
    va_list args;
    va_start(args, format);
    fprintf(stderr, "%s: ", family);
    vfprintf(stderr, format, args);
    fprintf(stderr, " (--only %s --seed %llu)\n", family, (unsigned long long)seed);
    va_end(args);
    exit(1);
}

void check_write(const char *folder, const char *name, const char *text) {
    char path[256];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    for (char *slash = path + 1; (slash = strchr(slash, '/')); slash++) {
        *slash = 0;
        mkdir(path, 0700);
        *slash = '/';
    }
    FILE *f = fopen(path, "w");
    check_true(f && fputs(text, f) >= 0 && fclose(f) == 0, "writing %s", path);
}

uint64_t check_random(void) {
    uint64_t z = (random_state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

uint32_t check_below(uint32_t n) {
    return (uint32_t)((check_random() >> 32) * n >> 32);
}

float check_normal(void) {
    double u = ((double)(check_random() >> 11) + 1) * 0x1p-53,
           v = (double)(check_random() >> 11) * 0x1p-53;
    return (float)(sqrt(-2 * log(u)) * cos(6.283185307179586 * v));
}

static float fill_value(enum check_kind kind) {
    static const uint32_t edges[] = {0,           0x80000000u, 0x00010000u, 0x807f0000u,
                                     0x23ff0000u, 0xa3ff0000u, 0x24000000u, 0xa4000000u,
                                     0x23ffffffu, 0x2b800000u, 0x3f800000u, 0xc9800000u};
    switch (kind) {
    case CHECK_SPREAD:
        return ldexpf(check_normal(), (int)check_below(41) - 20);
    case CHECK_EDGES:
        if (check_below(2))
            return dsv4_f32_from_bits(edges[check_below(sizeof edges / sizeof edges[0])]);
        return check_normal();
    case CHECK_ZEROS:
        return check_below(2) ? 0.0f : -0.0f;
    default:
        return check_normal();
    }
}

void check_fill_bf16(dsv4_bf16 *p, size_t n, enum check_kind kind) {
    for (size_t i = 0; i < n; i++)
        p[i] = dsv4_f32_to_bf16(fill_value(kind));
}

void check_fill_f32(float *p, size_t n, enum check_kind kind) {
    for (size_t i = 0; i < n; i++)
        p[i] = fill_value(kind);
}

void check_fill_bytes(void *p, size_t bytes) {
    for (size_t i = 0; i < bytes; i++)
        ((unsigned char *)p)[i] = (unsigned char)check_random();
}

int check_variants(enum dsv4_op op, const struct dsv4_variant **out) {
    int n = dsv4k_cpu_variants(op, out, CHECK_MAX_VARIANTS);
    check_true(n > 0 && strcmp(out[0]->name, "ref") == 0, "%s has no ref", dsv4k_op_name(op));
    return n;
}

static void print_hex(const unsigned char *p, size_t size) {
    for (size_t i = size; i-- > 0;)
        fprintf(stderr, "%02x", p[i]);
}

static void fail_at(const char *what, const struct dsv4_variant *v, size_t i, const void *got,
                    const void *want, size_t size) {
    fprintf(stderr, "%s %s: element %zu is 0x", dsv4k_op_name((enum dsv4_op)v->op), v->name, i);
    print_hex(got, size);
    fprintf(stderr, ", ref 0x");
    print_hex(want, size);
    fprintf(stderr, "\n");
    check_true(0, "%s", what);
}

void check_equal(const char *what, const struct dsv4_variant *v, const void *got, const void *want,
                 size_t n, size_t size) {
    n_compared++;
    if (memcmp(got, want, n * size) == 0)
        return;
    const unsigned char *g = got, *w = want;
    size_t i = 0;
    while (memcmp(g + i * size, w + i * size, size) == 0)
        i++;
    fail_at(what, v, i, g + i * size, w + i * size, size);
}

void check_equal_f32(const char *what, const struct dsv4_variant *v, const float *got,
                     const float *want, size_t n) {
    n_compared++;
    for (size_t i = 0; i < n; i++) {
        int both_nan = got[i] != got[i] && want[i] != want[i];
        if (!both_nan && memcmp(got + i, want + i, sizeof *got) != 0)
            fail_at(what, v, i, got + i, want + i, sizeof *got);
    }
}

void check_equal_bf16(const char *what, const struct dsv4_variant *v, const dsv4_bf16 *got,
                      const dsv4_bf16 *want, size_t n) {
    n_compared++;
    for (size_t i = 0; i < n; i++) {
        int both_nan = (got[i] & 0x7fffu) > 0x7f80u && (want[i] & 0x7fffu) > 0x7f80u;
        if (!both_nan && got[i] != want[i])
            fail_at(what, v, i, got + i, want + i, sizeof *got);
    }
}

/* Whether argv has `--skip name`. */
static int skipped(int argc, char **argv, const char *name) {
    for (int i = 1; i + 1 < argc; i++)
        if (strcmp(argv[i], "--skip") == 0 && strcmp(argv[i + 1], name) == 0)
            return 1;
    return 0;
}

int main(int argc, char **argv) {
    const char *only = NULL;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--list") == 0) {
            for (const struct check_family *f = check_families; f->name; f++)
                puts(f->name);
            return 0;
        }
        if (i + 1 < argc && strcmp(argv[i], "--only") == 0) {
            only = argv[++i];
        } else if (i + 1 < argc && strcmp(argv[i], "--seed") == 0) {
            seed = strtoull(argv[++i], NULL, 10);
        } else if (i + 1 < argc && strcmp(argv[i], "--skip") == 0) {
            i++;
        } else {
            fprintf(stderr, "usage: %s [--only family] [--skip family]... [--seed n] [--list]\n", argv[0]);
            return 2;
        }
    }
    int n_run = 0;
    for (const struct check_family *f = check_families; f->name; f++) {
        if ((only && strcmp(only, f->name) != 0) || skipped(argc, argv, f->name))
            continue;
        family = f->name;
        random_state = seed;
        n_compared = 0;
        f->run();
        check_reset();
        printf("%s ok: %ld comparisons\n", f->name, n_compared);
        fflush(stdout);
        n_run++;
    }
    if (!n_run)
        fprintf(stderr, "no family is called %s; --list shows them\n", only ? only : "(none)");
    return n_run ? 0 : 2;
}
