/* Ahead of the host's clock by the microseconds that lie in the file $CLOCK_OFFSET_FILE. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long microseconds(void) {
  static volatile long *ahead;
  if (!ahead) {
    int file = open(getenv("CLOCK_OFFSET_FILE"), O_RDONLY);
    ahead = mmap(0, sizeof *ahead, PROT_READ, MAP_SHARED, file, 0);
  }
  struct timespec now;
  syscall(SYS_clock_gettime, CLOCK_REALTIME, &now);
  return now.tv_sec * 1000000 + now.tv_nsec / 1000 + *ahead;
}

int gettimeofday(struct timeval *now, void *zone) {
  long shown = microseconds();
  now->tv_sec = shown / 1000000;
  now->tv_usec = shown % 1000000;
  return 0;
}

time_t time(time_t *now) {
  time_t shown = microseconds() / 1000000;
  if (now) *now = shown;
  return shown;
}
