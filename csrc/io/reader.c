/* SPDX-License-Identifier: Apache-2.0 */
#include "io/reader.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/types.h>
#include <unistd.h>

#include "core/threads.h"

/* Enough requests of enough bytes to keep an NVMe disk busy. */
enum { THREADS = 8, PIECE = 2 << 20 };

struct file {
    int fd;     /* owned; through the page cache */
    int direct; /* owned; past it, -1 where the file system does not know how */
    uint64_t size;
};

struct dsv4_reader {
    pthread_mutex_t lock;
    pthread_cond_t work, done;
    pthread_t threads[THREADS];
    int started, quit;
    pid_t pid; /* the process that owns the threads */
    struct file *files; /* owned, [n_file] */
    int32_t n_file;
    struct dsv4_load *first, *last; /* loads with pieces that nobody has taken */
    uint64_t bytes;
};

/* One piece; 1 when every byte that the file has was read. */
static int read_piece(const struct file *f, const struct dsv4_read *piece) {
    uint64_t end = piece->offset + piece->bytes, wanted = end < f->size ? end : f->size, at = piece->offset;
    int fd = f->direct >= 0 ? f->direct : f->fd;
    while (at < wanted) {
        ssize_t got = pread(fd, piece->to + (at - piece->offset), (size_t)(end - at), (off_t)at);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0 && fd == f->fd)
            return 0;
        if (got > 0)
            at += (uint64_t)got;
        if (got <= 0 || got % DSV4_READ_ALIGN) /* the rest, or what direct reads refuse, through the cache */
            fd = f->fd;
    }
    if (fd == f->fd)
        posix_fadvise(fd, (off_t)piece->offset, (off_t)piece->bytes, POSIX_FADV_DONTNEED);
    return 1;
}

/* The next piece of the oldest load; lock held. */
static struct dsv4_load *take_piece(dsv4_reader *r, struct dsv4_read *piece) {
    struct dsv4_load *load = r->first;
    const struct dsv4_read *read = &load->reads[load->next];
    uint64_t left = read->bytes - load->at;
    *piece = (struct dsv4_read){read->file, read->offset + load->at, left < PIECE ? left : PIECE, read->to + load->at};
    load->at += piece->bytes;
    load->running++;
    if (load->at == read->bytes) {
        load->at = 0;
        if (++load->next == load->n) {
            r->first = load->link;
            load->queued = 0;
        }
    }
    return load;
}

/* Takes a piece, reads it without the lock, and reports; lock held before and after. */
static void work_once(dsv4_reader *r) {
    struct dsv4_read piece;
    struct dsv4_load *load = take_piece(r, &piece);
    pthread_mutex_unlock(&r->lock);
    int good = read_piece(&r->files[piece.file], &piece);
    pthread_mutex_lock(&r->lock);
    r->bytes += piece.bytes;
    load->failed |= !good;
    if (--load->running == 0 && !load->queued)
        pthread_cond_broadcast(&r->done);
}

static void *thread_main(void *arg) {
    dsv4_reader *r = arg;
    pthread_mutex_lock(&r->lock);
    while (!r->quit) {
        if (r->first)
            work_once(r);
        else
            pthread_cond_wait(&r->work, &r->lock);
    }
    pthread_mutex_unlock(&r->lock);
    return NULL;
}

static dsv4_status open_files(dsv4_reader *r, const struct dsv4_shard_desc *files, int32_t n, dsv4_error *err) {
    for (int32_t i = 0; i < n; i++, r->n_file++) {
        char name[32];
        struct file *f = &r->files[i];
        f->size = files[i].size;
        f->fd = fcntl(files[i].fd, F_DUPFD_CLOEXEC, 0);
        if (f->fd < 0)
            return dsv4_fail(err, DSV4_E_IO, "%s: no file descriptor to read experts with: error %d", files[i].path,
                             errno);
        snprintf(name, sizeof name, "/proc/self/fd/%d", f->fd);
        f->direct = open(name, O_RDONLY | O_DIRECT | O_CLOEXEC);
    }
    return DSV4_OK;
}

dsv4_status dsv4_reader_create(dsv4_reader **out, const struct dsv4_shard_desc *files, int32_t n, dsv4_error *err) {
    dsv4_reader *r = calloc(1, sizeof *r);
    if (!r || !(r->files = calloc((size_t)n + 1, sizeof *r->files))) {
        free(r);
        return dsv4_fail(err, DSV4_E_MEMORY, "no memory for a reader of %d files", n);
    }
    r->pid = getpid();
    pthread_mutex_init(&r->lock, NULL);
    pthread_cond_init(&r->work, NULL);
    dsv4_condition_init(&r->done);
    dsv4_status status = open_files(r, files, n, err);
    if (status != DSV4_OK) {
        dsv4_reader_destroy(r);
        return status;
    }
    *out = r;
    return DSV4_OK;
}

void dsv4_reader_destroy(dsv4_reader *r) {
    if (!r)
        return;
    if (r->pid == getpid()) {
        pthread_mutex_lock(&r->lock);
        r->quit = 1;
        pthread_cond_broadcast(&r->work);
        pthread_mutex_unlock(&r->lock);
        for (int i = 0; i < r->started; i++)
            pthread_join(r->threads[i], NULL);
        pthread_mutex_destroy(&r->lock);
        pthread_cond_destroy(&r->work);
        pthread_cond_destroy(&r->done);
    }
    for (int32_t i = 0; i < r->n_file; i++) {
        close(r->files[i].fd);
        if (r->files[i].direct >= 0)
            close(r->files[i].direct);
    }
    free(r->files);
    free(r);
}

void dsv4_reader_start(dsv4_reader *r, struct dsv4_load *load) {
    load->next = load->failed = load->running = 0;
    load->at = 0;
    load->link = NULL;
    load->queued = load->n > 0;
    if (!load->n)
        return;
    pthread_mutex_lock(&r->lock);
    if (!r->started)
        while (r->started < THREADS && dsv4_thread_start(&r->threads[r->started], thread_main, r) == 0)
            r->started++;
    if (r->first)
        r->last->link = load;
    else
        r->first = load;
    r->last = load;
    pthread_cond_broadcast(&r->work);
    while (!r->started && r->first)
        work_once(r);
    pthread_mutex_unlock(&r->lock);
}

int dsv4_reader_wait(dsv4_reader *r, const struct dsv4_load *load, int milliseconds) {
    const struct timespec end = dsv4_deadline(milliseconds);
    pthread_mutex_lock(&r->lock);
    int late = 0;
    while ((load->queued || load->running) && !late)
        late = pthread_cond_timedwait(&r->done, &r->lock, &end) == ETIMEDOUT;
    int pending = load->queued || load->running;
    pthread_mutex_unlock(&r->lock);
    return pending;
}

void dsv4_reader_forget(dsv4_reader *r, int32_t file, uint64_t offset, uint64_t bytes) {
    posix_fadvise(r->files[file].fd, (off_t)offset, (off_t)bytes, POSIX_FADV_DONTNEED);
}

uint64_t dsv4_reader_bytes(dsv4_reader *r) {
    pthread_mutex_lock(&r->lock);
    uint64_t bytes = r->bytes;
    pthread_mutex_unlock(&r->lock);
    return bytes;
}
