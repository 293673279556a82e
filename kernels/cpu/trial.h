/* SPDX-License-Identifier: Apache-2.0 */
/* Short experiments at load: is an instruction's sum the contract's sum, and which of two variants
 * is faster here. */
#ifndef DSV4_CPU_TRIAL_H
#define DSV4_CPU_TRIAL_H

#include "kernels.h"

/* Working memory of the experiments; NULL when there is none to be had. */
struct dsv4_trial;
struct dsv4_trial *dsv4k_trial_create(void);
void dsv4k_trial_destroy(struct dsv4_trial *trial);

/* Whether `candidate` gives the bits of `ref` on random and edge operands; both are
 * linear_many_bf16. */
int dsv4k_trial_equal(struct dsv4_trial *trial, const struct dsv4_variant *candidate,
                      const struct dsv4_variant *ref);

/* Seconds of one call of a linear layer (weights not in any cache) or of attention; 0 for
 * operations without an experiment. */
double dsv4k_trial_seconds(struct dsv4_trial *trial, const struct dsv4_variant *variant);

#endif
