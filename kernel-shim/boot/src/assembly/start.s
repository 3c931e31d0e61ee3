// From reset to Rust: the PVH entry of the first CPU, the SIPI entry of the others, and the tables
// both begin with.
//
// PVH enters in 32-bit protected mode, paging off, flat segments, EBX = physical address of the
// start info (Xen public headers, arch-x86/hvm/start_info.h). Other CPUs start in real mode at the
// SIPI vector (Intel SDM vol. 3A, 8.4.3). Both meet in long_mode.

.section .note.pvh, "a", @note
    .balign 4
    .long 4                             // length of the name
    .long 8                             // length of the value
    .long 18                            // XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_start

.section .boot, "awx", @progbits

// Four tables: 2 MiB pages over the first 4 GiB, seen at 0 (to switch paging on), at PHYS_OFFSET
// and, its first GiB, at the image's own address. Replaced by src/arch/paging.rs, kept for the CPUs
// that start later.
    .balign 4096
boot_pml4:
    .quad boot_pdpt + 3
    .fill 255, 8, 0
    .quad boot_pdpt + 3
    .fill 254, 8, 0
    .quad boot_pdpt_image + 3
boot_pdpt:
    .quad boot_pd + 0x0003
    .quad boot_pd + 0x1003
    .quad boot_pd + 0x2003
    .quad boot_pd + 0x3003
    .fill 508, 8, 0
boot_pdpt_image:
    .fill 510, 8, 0
    .quad boot_pd + 0x0003
    .quad 0
boot_pd:
    .set boot_page, 0
    .rept 2048
    .quad boot_page + 0x83              // present, writable, 2 MiB
    .set boot_page, boot_page + 0x200000
    .endr

    .balign 8
boot_gdt:
    .quad 0
    .quad 0x00cf9b000000ffff            // 0x08: 32-bit code
    .quad 0x00cf93000000ffff            // 0x10: data
    .quad 0x00af9b000000ffff            // 0x18: 64-bit code
boot_gdt_pointer:
    .word 31
    .long boot_gdt
boot_start_info:
    .long 0

.code32
.global pvh_start
pvh_start:
    cli
    cld
    mov dword ptr [boot_start_info], ebx
    lgdt [boot_gdt_pointer]
    xor edi, edi                        // EDI: 0 first CPU, 1 another
    jmp long_mode

secondary_protected_mode:
    mov ax, 0x10
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov edi, 1

// SSE is on before any Rust code runs: the compiler, and the prebuilt core, use it freely.
long_mode:
    mov eax, cr4
    or eax, 0x620                       // PAE | OSFXSR | OSXMMEXCPT
    mov cr4, eax
    mov eax, offset boot_pml4
    mov cr3, eax
    mov ecx, 0xc0000080                 // IA32_EFER
    rdmsr
    or eax, 0x900                       // LME | NXE
    wrmsr
    mov eax, cr0
    and eax, 0x9ffffff3                 // not CD, not NW, which INIT sets; not EM, not TS
    or eax, 0x80010023                  // PG | WP | NE | MP | PE
    mov cr0, eax
    .byte 0xea                          // far jump to 0x18:long_mode_64
    .long long_mode_64
    .word 0x18

.code64
long_mode_64:
    mov ax, 0x10
    mov ds, ax
    mov es, ax
    mov ss, ax
    xor eax, eax
    mov fs, ax
    mov gs, ax
    mov ebx, dword ptr [boot_start_info]
    movabs rax, offset start_high
    jmp rax

// Copied to TRAMPOLINE in the first megabyte: real mode, CS:IP = vector << 8 : 0, nothing else
// known.
.code16
.global trampoline_start
trampoline_start:
    cli
    cld
    xor ax, ax
    mov ds, ax
    .byte 0x66, 0x0f, 0x01, 0x16        // LGDT [disp16], 32-bit operand: the whole base is loaded
    .word {trampoline} + trampoline_gdt_pointer - trampoline_start
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xea                    // far jump to 0x08:secondary_protected_mode
    .long secondary_protected_mode
    .word 0x08
trampoline_gdt_pointer:
    .word 31
    .long boot_gdt
.global trampoline_end
trampoline_end:

.code64
.section .text.start, "ax", @progbits
start_high:
    test edi, edi
    jnz 1f

    // First CPU. The loader need not have cleared .bss; clear it before anything lives there.
    movabs rdi, offset bss_start
    movabs rcx, offset bss_end
    sub rcx, rdi
    xor eax, eax
    rep stosb
    lea rsp, [rip + boot_stack + {boot_stack_size}]
    mov edi, ebx
    xor ebp, ebp
    call {boot_main}
    ud2

    // Another CPU. Its root maps neither this code's low copy nor the boot GDT; it loads its own
    // GDT first thing in Rust.
1:  mov rax, qword ptr [rip + {start_block} + {start_root}]
    mov rsp, qword ptr [rip + {start_block} + {start_stack}]
    mov rdi, qword ptr [rip + {start_block} + {start_cpu}]
    mov cr3, rax
    xor ebp, ebp
    call {secondary_main}
    ud2

.section .bss.boot_stack, "aw", @nobits
    .balign 4096
boot_stack:
    .skip {boot_stack_size}
