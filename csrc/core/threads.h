/* SPDX-License-Identifier: Apache-2.0 */
/* Threads of the engine, and time by the clock that nobody sets. */
#ifndef DSV4_THREADS_H
#define DSV4_THREADS_H

#include <pthread.h>
#include <time.h>

/* As pthread_create; the thread blocks every signal: handlers run in the application's own threads. */
int dsv4_thread_start(pthread_t *thread, void *(*fn)(void *), void *arg);

/* A condition that is waited for until a dsv4_deadline. */
void dsv4_condition_init(pthread_cond_t *condition);
struct timespec dsv4_deadline(int milliseconds); /* so many from now on */

double dsv4_seconds(void); /* since some moment */

#endif
