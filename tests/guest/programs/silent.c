/*
 * The first process of a guest that comes to its fork point, and never says that it has
 * its identity. VERSION is the agreement's (guest-kernel/abi).
 */
#include <fcntl.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

/* The doorbell page, and in it the fork point's register (abi/src/doorbell.rs). */
#define DOORBELL 0xd0000000
#define FORK_POINT 0

int main(void)
{
    int memory = open("/dev/mem", O_RDWR | O_SYNC);
    volatile uint64_t *doorbell =
        mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, memory, DOORBELL);

    if (doorbell != MAP_FAILED)
        doorbell[FORK_POINT] = VERSION;
    for (;;)
        pause();
}
