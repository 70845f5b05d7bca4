// SPDX-License-Identifier: Apache-2.0

package maps

// The Makefile sets both variables: the clang that the committed object was made
// with, and where this machine keeps the kernel's architecture headers.
//go:generate go tool bpf2go -cc $BPF_CLANG -target bpfel -go-package maps -output-stem snilb -type flow4_key -type flow4 -type flow6_key -type flow6 -type flow -type listener_key -type listener -type path_key -type path -type nexthop -type nexthop_flag -type live -type counter_user -type instance_record -type owned_hello -type cookie_key -type event_header -type counter_set -type reason -type unknown_flow -type dead_policy -type event_kind -type tap_request -type flow_state -type live_flag -type flow_job -type flow_jobs -type flow_job_op -type flow_jobs_args -type leg bpf ../bpf/snilb.bpf.c -- -O2 -g -mcpu=v3 -Wall -Wextra -Werror -Wno-unused-parameter $BPF_CFLAGS

// The types are those of the first object.
//go:generate go tool bpf2go -cc $BPF_CLANG -target bpfel -go-package maps -output-stem snilb_xdp -no-global-types xdp ../bpf/snilb_xdp.bpf.c -- -O2 -g -mcpu=v3 -Wall -Wextra -Werror -Wno-unused-parameter $BPF_CFLAGS
