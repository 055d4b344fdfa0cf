/*
 * For Node: has OpenSSL's generator reseed, which notices the fork of a process and not
 * that of a machine. In each child, after the line `child ...`:
 *
 *     process.dlopen({ exports: {} }, "/reseed.node");
 *
 *     cc -shared -fPIC -o reseed.node reseed.c
 *
 * Node calls this function at each dlopen (Node-API), and exports OpenSSL's, or is linked
 * with it.
 */
#include <stdio.h>
#include <stdlib.h>

int RAND_poll(void);

void *napi_register_module_v1(void *env, void *exports)
{
    (void)env;
    if (!RAND_poll()) {
        fputs("reseed: OpenSSL has no random numbers\n", stderr);
        abort();
    }
    return exports;
}
