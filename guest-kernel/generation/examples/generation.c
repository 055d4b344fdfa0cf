/*
 * Says which generation this machine is of, waits for the next, and says that too.
 *
 *     cc -o generation -I.. generation.c && ./generation [FILE]
 */
#include "vm_run_generation.h"
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

int main(int argc, char **argv)
{
    struct vm_run_generation g;
    int result = vm_run_generation_open_at(&g, argc > 1 ? argv[1] : VM_RUN_GENERATION_PATH);

    if (result == -ENOENT) {
        puts("none");
        return 0;
    }
    while (result >= 0) {
        printf("generation=%" PRIu64 "\n", g.last);
        fflush(stdout);
        do
            result = vm_run_generation_wait(&g, -1);
        while (result == -EINTR);
    }
    fprintf(stderr, "generation: %s\n", strerror(-result));
    return 1;
}
