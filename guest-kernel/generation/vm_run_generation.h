/*
 * Tells a program in a vm-run guest whether its machine has been forked since it last
 * looked: then what it holds of random numbers, of names or of time may be a sibling's
 * too. docs/identity.md says what changes in a child.
 *
 *     struct vm_run_generation g;
 *     int has_one = vm_run_generation_open(&g) == 0;       once, early
 *     if (has_one && vm_run_generation_changed(&g) == 1)    whenever it matters:
 *         reseed();                                         one system call
 *
 * Or have a thread in vm_run_generation_wait(), or poll g.fd for POLLPRI: each change is
 * told once. A result below 0 is an errno, negative.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef VM_RUN_GENERATION_H
#define VM_RUN_GENERATION_H

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

#define VM_RUN_GENERATION_PATH "/proc/sys/kernel/random/generation"

/* 0 in a machine that was booted, another number at random in each child of it. */
struct vm_run_generation {
    int fd;
    uint64_t last;
};

static inline int vm_run_generation_read(int fd, uint64_t *number)
{
    char text[24], *end;
    ssize_t n = pread(fd, text, sizeof text - 1, 0);

    if (n < 0)
        return -errno;
    text[n] = 0;
    if (text[0] < '0' || text[0] > '9')
        return -EINVAL;
    errno = 0;
    *number = strtoull(text, &end, 10);
    return errno || *end != '\n' ? -EINVAL : 0;
}

/* Opens a file and reads it; -ENOENT: this kernel has none, and tells of no fork. */
static inline int vm_run_generation_open_at(struct vm_run_generation *g, const char *path)
{
    int result;

    g->last = 0;
    g->fd = open(path, O_RDONLY | O_CLOEXEC);
    if (g->fd < 0)
        return -errno;
    result = vm_run_generation_read(g->fd, &g->last);
    if (result < 0) {
        close(g->fd);
        g->fd = -1;
    }
    return result;
}

static inline int vm_run_generation_open(struct vm_run_generation *g)
{
    return vm_run_generation_open_at(g, VM_RUN_GENERATION_PATH);
}

/* Whether the machine has been forked since the last time: 1 or 0. */
static inline int vm_run_generation_changed(struct vm_run_generation *g)
{
    uint64_t before = g->last;
    int result = vm_run_generation_read(g->fd, &g->last);

    return result < 0 ? result : g->last != before;
}

/*
 * Waits for that, at most so many milliseconds (-1: for ever): 1, or 0 if it has not
 * come. It may return 0 early; -EINTR after a signal.
 */
static inline int vm_run_generation_wait(struct vm_run_generation *g, int timeout)
{
    struct pollfd watched = { .fd = g->fd, .events = POLLPRI };
    /* What came before the poll is in the number; what comes after it is told. */
    int changed = vm_run_generation_changed(g);

    if (changed)
        return changed;
    do {
        if (poll(&watched, 1, timeout) < 0)
            return -errno;
        changed = vm_run_generation_changed(g);
    } while (!changed && timeout < 0);
    return changed;
}

#endif
