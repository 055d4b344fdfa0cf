/*
 * Draws random numbers in a loop in each of N threads, is warm meanwhile, and says in each
 * child what every thread drew first.
 *
 *     drawing call|vdso N
 *
 * By `call` the first is what getrandom(2) returned first after the fork, even if it was
 * frozen within; by `vdso`, where nobody can take back what a register holds, what was
 * asked for first.
 */
#include "vm_run_generation.h"
#include <elf.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>

#define THREADS 8
#define VALUE 16
/* So large that a thread is hardly ever anywhere else than in the call. */
#define DRAWN (256 << 10)

/* Documented in Linux lib/vdso/getrandom.c. */
typedef ssize_t vdso_getrandom(void *buffer, size_t len, unsigned flags, void *state, size_t size);

struct params {
    uint32_t size, prot, flags, reserved[13];
};

static vdso_getrandom *from_vdso;
static struct params params;
static unsigned char first[THREADS][VALUE];

static void fail(const char *why)
{
    perror(why);
    exit(1);
}

static struct vm_run_generation watch(void)
{
    struct vm_run_generation generation;

    if (vm_run_generation_open(&generation))
        fail(VM_RUN_GENERATION_PATH);
    return generation;
}

static void *draw_by_call(void *mine)
{
    struct vm_run_generation generation = watch();
    unsigned char *drawn = malloc(DRAWN);

    if (!drawn)
        fail("malloc");
    do
        if (syscall(SYS_getrandom, drawn, DRAWN, 0) <= 0)
            fail("getrandom");
    while (!vm_run_generation_changed(&generation));
    return memcpy(mine, drawn, VALUE);
}

static void *draw_by_vdso(void *mine)
{
    struct vm_run_generation generation = watch();
    /* Whole pages, and no state may lie across two. */
    void *state = mmap(NULL, 4096, params.prot, params.flags, -1, 0);
    unsigned char drawn[VALUE];
    int fresh;

    if (state == MAP_FAILED)
        fail("mmap");
    do {
        fresh = vm_run_generation_changed(&generation);
        if (from_vdso(drawn, sizeof drawn, 0, state, params.size) != sizeof drawn)
            fail("the vDSO's getrandom");
    } while (!fresh);
    return memcpy(mine, drawn, VALUE);
}

/* The vDSO is an ELF file in memory, at addresses that begin at 0. */
static void *find_in_vdso(const char *name)
{
    const char *base = (const char *)getauxval(AT_SYSINFO_EHDR);
    const Elf64_Ehdr *header = (const void *)base;
    const Elf64_Sym *symbols = NULL;
    const char *names = NULL;
    size_t count = 0;

    if (!base)
        return NULL;
    const Elf64_Shdr *sections = (const void *)(base + header->e_shoff);
    for (int i = 0; i < header->e_shnum; i++)
        if (sections[i].sh_type == SHT_DYNSYM) {
            symbols = (const void *)(base + sections[i].sh_offset);
            count = sections[i].sh_size / sizeof *symbols;
            names = base + sections[sections[i].sh_link].sh_offset;
        }
    for (size_t i = 0; i < count; i++)
        if (!strcmp(names + symbols[i].st_name, name))
            return (void *)(base + symbols[i].st_value);
    return NULL;
}

static void be_warm(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    const char *path = getenv("VM_RUN_WARM");
    int s = socket(AF_UNIX, SOCK_STREAM, 0);
    char c = 0;

    strncpy(address.sun_path, path ? path : "", sizeof address.sun_path - 1);
    if (s < 0 || connect(s, (void *)&address, sizeof address) || write(s, "warm\n", 5) != 5)
        fail("VM_RUN_WARM");
    while (c != '\n')
        if (read(s, &c, 1) != 1)
            fail("the line");
}

int main(int argc, char **argv)
{
    void *(*draw)(void *) = draw_by_call;
    pthread_t threads[THREADS];
    int count = argc > 2 ? atoi(argv[2]) : 0;

    if (count < 1 || count > THREADS)
        fail("drawing call|vdso N");
    if (!strcmp(argv[1], "vdso")) {
        from_vdso = (vdso_getrandom *)find_in_vdso("__vdso_getrandom");
        if (!from_vdso || from_vdso(NULL, 0, 0, &params, ~0UL)) {
            puts("no vDSO");
            be_warm();
            return 0;
        }
        draw = draw_by_vdso;
    }
    for (int i = 0; i < count; i++)
        if (pthread_create(&threads[i], NULL, draw, first[i]))
            fail("a thread");
    /* They are at it. */
    usleep(200000);
    be_warm();
    for (int i = 0; i < count; i++) {
        pthread_join(threads[i], NULL);
        for (int j = 0; j < VALUE; j++)
            printf("%02x", first[i][j]);
        puts("");
    }
    return 0;
}
