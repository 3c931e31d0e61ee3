// Every interrupt and exception: 256 stubs, one path from ring 0, one path from ring 3, and the way
// into ring 3.
//
// All gates are interrupt gates on an IST stack, because compiled code keeps data below its stack
// pointer (the red zone of the x86-64 psABI), where an interrupt on the same stack would overwrite
// it. Layout of what is pushed: context::TrapFrame.

// Takes the general registers of a context::TrapFrame off the stack, and drops vector and error
// code: IRETQ takes the rest.
.macro pop_frame
    pop r15
    pop r14
    pop r13
    pop r12
    pop r11
    pop r10
    pop r9
    pop r8
    pop rbp
    pop rdi
    pop rsi
    pop rdx
    pop rcx
    pop rbx
    pop rax
    add rsp, 16
.endm

.section .text.trap, "ax", @progbits

    .balign 16
.global trap_stubs
trap_stubs:
    .set trap_vector, 0
    .rept 256
    .balign 16
    // Vectors 8, 10-14, 17, 21, 29 and 30 push an error code themselves (Intel SDM vol. 3A, table
    // 6-1; AMD APM vol. 2, table 8-1).
    .if !((trap_vector == 8) || (trap_vector >= 10 && trap_vector <= 14) || (trap_vector == 17) || (trap_vector == 21) || (trap_vector == 29) || (trap_vector == 30))
    push 0
    .endif
    .byte 0x68                          // push imm32, always of the same length
    .long trap_vector
    jmp trap_entry
    .set trap_vector, trap_vector + 1
    .endr

trap_entry:
    push rax
    push rbx
    push rcx
    push rdx
    push rsi
    push rdi
    push rbp
    push r8
    push r9
    push r10
    push r11
    push r12
    push r13
    push r14
    push r15
    cld
    test byte ptr [rsp + {frame_cs}], 3
    jnz 3f

    // From ring 0. GS is the user's in the few instructions next to a SWAPGS, where an NMI or a
    // faulting IRETQ can still land here; only the MSR tells. Kernel addresses are negative.
    xor ebx, ebx
    mov ecx, 0xc0000101                 // IA32_GS_BASE
    rdmsr
    test edx, edx
    js 1f
    swapgs
    inc ebx
1:  mov rdi, rsp
    sub rsp, 512
    fxsave64 [rsp]
    ldmxcsr dword ptr [rip + kernel_mxcsr]
    call {trap_from_kernel}
    fxrstor64 [rsp]
    add rsp, 512
    test ebx, ebx
    jz 2f
    swapgs
2:  pop_frame
    iretq

    // From ring 3: the frame moves into the UserContext that enter_user was given, and enter_user
    // returns. The IST stack is left behind, so the kernel handles the trap on its ordinary stack,
    // may fault, sleep and be interrupted there.
3:  swapgs
    mov rdi, qword ptr gs:[{cpu_user_context}]
    mov rsi, rsp
    mov ecx, {frame_words}
    rep movsq
    fxsave64 [rdi]
    ldmxcsr dword ptr [rip + kernel_mxcsr]
    mov rsp, qword ptr gs:[{cpu_kernel_stack}]
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbx
    pop rbp
    ret

// enter_user(context: *mut UserContext): returns at the next trap from ring 3. Interrupts are off
// on entry and on return.
.global enter_user
enter_user:
    push rbp
    push rbx
    push r12
    push r13
    push r14
    push r15
    mov qword ptr gs:[{cpu_user_context}], rdi
    mov qword ptr gs:[{cpu_kernel_stack}], rsp
    fxrstor64 [rdi + {frame_words} * 8]
    mov rsp, rdi                        // nothing is pushed until IRETQ; an NMI has its own stack
    pop_frame
    swapgs
    iretq

    .balign 4
kernel_mxcsr:
    .long 0x1f80                        // all exceptions masked, round to nearest: the psABI's value
