// The program that runs in ring 3: a few loops over memory, each ended by the system call INT 0x80.
//
// It is copied to a user page, so it refers to nothing outside itself. Registers in: RDI first
// address, RSI stride in bytes, RDX number of words, R8 value, R9 what is added to the value at
// each step. Out: RAX status (0 done, 1 stopped early), RDI the address it stopped at, RDX how many
// were left, RCX the value last seen, RBX the sum of all that was read.

.section .rodata.agent, "a", @progbits
    .balign 16
.global agent_start
agent_start:

.global agent_read
agent_read:
    xor ebx, ebx
    xor ecx, ecx
1:  test rdx, rdx
    jz agent_done
    mov rcx, qword ptr [rdi]
    add rbx, rcx
    add rdi, rsi
    dec rdx
    jmp 1b

.global agent_write
agent_write:
    test rdx, rdx
    jz agent_done
    mov qword ptr [rdi], r8
    add r8, r9
    add rdi, rsi
    dec rdx
    jmp agent_write

// Stops at the first word that does not hold the expected value.
.global agent_check
agent_check:
    test rdx, rdx
    jz agent_done
    mov rcx, qword ptr [rdi]
    cmp rcx, r8
    jne agent_stopped
    add r8, r9
    add rdi, rsi
    dec rdx
    jmp agent_check

// Reads one word again and again, until it no longer holds R8 (stopped) or RDX reads are over
// (done).
.global agent_watch
agent_watch:
    test rdx, rdx
    jz agent_done
    mov rcx, qword ptr [rdi]
    cmp rcx, r8
    jne agent_stopped
    pause
    dec rdx
    jmp agent_watch

// Writes 1, 2, 3, ... to one word, and never ends by itself; the kernel takes the CPU back with an
// interrupt.
.global agent_count
agent_count:
    inc rbx
    mov qword ptr [rdi], rbx
    pause
    jmp agent_count

agent_done:
    xor eax, eax
    int 0x80
    ud2

agent_stopped:
    mov eax, 1
    int 0x80
    ud2

.global agent_end
agent_end:
