/*
 * A program that would notice if its memory were not what it was: threads write pages at
 * random, and one reads them all, again and again. Each page says in every word what was
 * last written to it.
 *
 *     scribble MIB THREADS
 *
 * After each round of reading it prints a line, `round N of GENERATION`: the machine was
 * that one all through the round. What it finds wrong it says, and ends.
 */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define WORDS (4096 / sizeof(uint64_t))

static uint64_t (*pages)[WORDS];
static uint64_t *counts;
static atomic_flag *locks;
static size_t len;

/* The first word of a page that was written so often. Each next one is STEP more. */
#define STEP 0xd1342543de82ef95

static uint64_t first(size_t page, uint64_t count)
{
	uint64_t x = page * 0x9e3779b97f4a7c15 + count * 0xbf58476d1ce4e5b9;

	x ^= x >> 31;
	x *= 0x94d049bb133111eb;
	return x ^ x >> 29;
}

static void fill(size_t page)
{
	uint64_t word = first(page, counts[page]);

	for (size_t at = 0; at < WORDS; at++, word += STEP)
		pages[page][at] = word;
}

static void check(size_t page)
{
	uint64_t word = first(page, counts[page]);

	for (size_t at = 0; at < WORDS; at++, word += STEP) {
		if (pages[page][at] != word) {
			printf("page %zu, word %zu is wrong\n", page, at);
			exit(1);
		}
	}
}

static void take(size_t page)
{
	while (atomic_flag_test_and_set(&locks[page]))
		sched_yield();
}

static void *scribble(void *seed)
{
	uint64_t x = (uintptr_t)seed;
	struct timespec pause = { 0, 200000 };

	for (unsigned done = 1;; done++) {
		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
		size_t page = x % len;
		take(page);
		counts[page]++;
		fill(page);
		atomic_flag_clear(&locks[page]);
		if (done % 16 == 0)
			nanosleep(&pause, NULL);
	}
	return NULL;
}

static unsigned long long generation(void)
{
	unsigned long long generation = 0;
	FILE *file = fopen("/proc/sys/kernel/random/generation", "r");

	if (!file || fscanf(file, "%llu", &generation) != 1)
		exit(3);
	fclose(file);
	return generation;
}

int main(int argc, char **argv)
{
	if (argc != 3)
		return 2;
	len = strtoul(argv[1], NULL, 10) << 8;
	pages = mmap(NULL, len * sizeof(*pages), PROT_READ | PROT_WRITE,
		     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	counts = calloc(len, sizeof(*counts));
	locks = calloc(len, sizeof(*locks));
	if (pages == MAP_FAILED || !counts || !locks)
		return 1;
	for (size_t page = 0; page < len; page++)
		fill(page);
	for (long thread = 1; thread <= strtol(argv[2], NULL, 10); thread++) {
		pthread_t id;

		if (pthread_create(&id, NULL, scribble, (void *)(uintptr_t)(thread * 7919)))
			return 1;
	}
	for (unsigned long round = 1;; round++) {
		unsigned long long before = generation();

		for (size_t page = 0; page < len; page++) {
			take(page);
			check(page);
			atomic_flag_clear(&locks[page]);
		}
		if (before == generation()) {
			printf("round %lu of %llu\n", round, before);
			fflush(stdout);
		}
	}
}
