/* A CUDA driver that answers questions and computes nothing, for what happens in pytest's own processes.
 *
 * Like the real one it reads CUDA_VISIBLE_DEVICES once, at a process's first cuInit, and answers 3
 * (CUDA_ERROR_NOT_INITIALIZED) in a process that was forked after that. What it is to be stands in the environment:
 *
 * STUB_CARDS  how many cards the machine has
 * STUB_MIG    1: each card is partitioned, of which CUDA shows a process one instance, whatever is listed
 * STUB_FAIL   CALL:STATUS, a call that fails: cuInit:999
 * STUB_LOG    a file that gets a line for each process that starts the driver: its pid and CUDA_VISIBLE_DEVICES
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { OK = 0, INVALID_VALUE = 1, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_DEVICE = 101, MOST = 16 };

static pid_t owner; /* of the process that called cuInit, kept by those forked from it */
static int shown[MOST], count;

static int failing(const char *call) {
  const char *asked = getenv("STUB_FAIL");
  size_t length = strlen(call);
  return asked && !strncmp(asked, call, length) && asked[length] == ':' ? atoi(asked + length + 1) : OK;
}

/* The sixteenth byte of a card's UUID is its number and one; a partition's first byte is 1. */
static void identity(unsigned char *uuid, int card) {
  memset(uuid, 0, 16);
  uuid[0] = getenv("STUB_MIG") != NULL;
  uuid[15] = (unsigned char)(card + 1);
}

/* The card that an entry of CUDA_VISIBLE_DEVICES names, by number or by UUID; -1 for none. */
static int named(const char *entry, int all) {
  while (*entry == ' ') entry++;
  if (!strncmp(entry, "GPU-", 4) || !strncmp(entry, "MIG-", 4)) {
    for (int card = 0; card < all; card++) {
      unsigned char u[16];
      char text[48];
      identity(u, card);
      snprintf(text, sizeof text, "%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", u[0], u[1], u[2],
               u[3], u[4], u[5], u[6], u[7], u[8], u[9], u[10], u[11], u[12], u[13], u[14], u[15]);
      if (!strcmp(entry + 4, text)) return card;
    }
    return -1;
  }
  char *end;
  long card = strtol(entry, &end, 10);
  return end != entry && card >= 0 && card < all ? (int)card : -1;
}

static void look(void) {
  int all = getenv("STUB_CARDS") ? atoi(getenv("STUB_CARDS")) : 0;
  int most = getenv("STUB_MIG") ? 1 : MOST;
  const char *visible = getenv("CUDA_VISIBLE_DEVICES");
  if (!visible) {
    while (count < all && count < most) {
      shown[count] = count;
      count++;
    }
    return;
  }
  char *list = strdup(visible), *rest = NULL;
  for (char *entry = strtok_r(list, ",", &rest); entry && count < most; entry = strtok_r(NULL, ",", &rest)) {
    int card = named(entry, all);
    if (card < 0) break; /* and everything behind it is ignored */
    shown[count++] = card;
  }
  free(list);
}

static int ready(const char *call) { return owner != getpid() ? NOT_INITIALIZED : failing(call); }

int cuInit(unsigned flags) {
  if (owner && owner != getpid()) return NOT_INITIALIZED;
  if (flags) return INVALID_VALUE;
  if (!owner) {
    const char *log = getenv("STUB_LOG"), *visible = getenv("CUDA_VISIBLE_DEVICES");
    FILE *file = log ? fopen(log, "a") : NULL;
    if (file) {
      fprintf(file, "%d %s\n", (int)getpid(), visible ? visible : "(unset)");
      fclose(file);
    }
    owner = getpid();
    look();
  }
  if (failing("cuInit")) return failing("cuInit");
  return count ? OK : NO_DEVICE;
}

int cuDriverGetVersion(int *version) {
  *version = 13000;
  return OK;
}

int cuDeviceGetCount(int *found) {
  *found = count;
  return ready("cuDeviceGetCount");
}

int cuDeviceGet(int *device, int index) {
  if (index < 0 || index >= count) return INVALID_DEVICE;
  *device = index;
  return ready("cuDeviceGet");
}

int cuDeviceGetName(char *name, int bytes, int device) {
  (void)device;
  snprintf(name, (size_t)bytes, "Stub H100 80GB%s", getenv("STUB_MIG") ? " MIG 1g.10gb" : "");
  return ready("cuDeviceGetName");
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  (void)device;
  *value = attribute == 75 ? 9 : 0; /* compute capability 9.0 */
  return ready("cuDeviceGetAttribute");
}

int cuDeviceGetUuid_v2(unsigned char *uuid, int device) {
  identity(uuid, shown[device]);
  return ready("cuDeviceGetUuid");
}

int cuDeviceTotalMem_v2(size_t *bytes, int device) {
  *bytes = (size_t)(80 - 40 * (shown[device] % 2)) << 30; /* every other card is a small one */
  return ready("cuDeviceTotalMem");
}
