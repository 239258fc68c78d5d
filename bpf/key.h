/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * The identity of a client that is not named by its four-tuple: a keyed hash of
 * its address, or of bytes of the payload.
 *
 * Two multilinear hashes with keys of their own make its halves: each is the
 * upper half of a key plus the sum of 32-bit words times 64-bit keys, modulo
 * 2^64. That is strongly universal (Lemire and Kaser, "Strongly universal string
 * hashing is fast", 2014): who does not know the keys cannot name two inputs that
 * meet with a probability above 2^-64, nor many that fall into one bucket. A
 * hash that mixes the key in by exclusive or has such inputs whatever the key.
 * SipHash would cost 10 to 18 ns more.
 *
 * A sum is linear: inputs in a row (the addresses of a network, numbered ids) lie
 * at even distances in it, and with one key in a hundred some buckets get fifteen
 * times their share. Hence the mixing at the end. It can be undone, so that two
 * identities meet no more often than without it.
 */
#ifndef RPSEL_KEY_H
#define RPSEL_KEY_H

#include "flow.h"

ALWAYS_INLINE __u64 multilinear(const __u64 keys[KEY_WORDS + 1], const __u32 *words, __u32 n)
{
	__u64 sum = keys[0];

#pragma unroll
	for (__u32 i = 0; i < n; i++)
		sum += keys[i + 1] * words[i];
	return sum >> 32;
}

/* keyed_identity hashes n words, KEY_WORDS at most; n is known to the compiler. */
ALWAYS_INLINE __u64 keyed_identity(const struct keys *k, const __u32 *words, __u32 n)
{
	__u64 x = multilinear(k->high, words, n) << 32 | multilinear(k->low, words, n);

	/* The finalizer of SplitMix64 (Stafford's variant 13). */
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
	x = (x ^ x >> 27) * 0x94d049bb133111ebull;
	return x ^ x >> 31;
}

#endif
