//! The console: the first serial port, polled.
//!
//! One CPU prints at a time, a whole line. A CPU that has to print from an NMI may have interrupted
//! the code that holds the lock, so it waits for a bounded time and then prints anyway.

use core::fmt::{self, Write};

use spin::Mutex;
use x86_64::instructions::interrupts::without_interrupts;
use x86_64::instructions::port::Port;

/// COM1 on a PC.
const BASE: u16 = 0x3f8;
/// Line status: the transmitter takes another byte.
const TRANSMIT_EMPTY: u8 = 1 << 5;
/// How often an urgent writer tries the lock before it goes on without it.
const URGENT_PATIENCE: u32 = 1 << 20;

static CONSOLE: Mutex<SerialPort> = Mutex::new(SerialPort);

/// Prints one line on the serial console.
#[macro_export]
macro_rules! println {
    ($($argument:tt)*) => { $crate::arch::serial::print_line(format_args!($($argument)*)) };
}

/// Sets the port to 115200 baud, 8 bits, no parity, FIFOs on, interrupts off.
pub fn init() {
    // 16550 data sheet, register map: 1 interrupt enable, 2 FIFO control, 3 line control, 4 modem
    // control; with bit 7 of the line control set, 0 and 1 are the divisor of 115200.
    for (register, value) in [(1, 0x00), (3, 0x80), (0, 0x01), (1, 0x00), (3, 0x03), (2, 0xc7), (4, 0x03)] {
        write_register(register, value);
    }
}

/// Prints `line` and a line feed; other CPUs wait for their turn.
pub fn print_line(line: fmt::Arguments<'_>) {
    without_interrupts(|| write_line(&mut CONSOLE.lock(), line));
}

/// Prints `line` from an NMI, an exception or a panic, where the lock may be held by the very code
/// that was interrupted.
pub(crate) fn print_line_urgent(line: fmt::Arguments<'_>) {
    without_interrupts(|| {
        for _ in 0..URGENT_PATIENCE {
            if let Some(mut port) = CONSOLE.try_lock() {
                return write_line(&mut port, line);
            }
            core::hint::spin_loop();
        }
        write_line(&mut SerialPort, line);
    });
}

/// The port itself; the lock around it protects it.
#[derive(Debug)]
struct SerialPort;

impl Write for SerialPort {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            send(byte);
        }
        Ok(())
    }
}

fn write_line(port: &mut SerialPort, line: fmt::Arguments<'_>) {
    // Writing to the port cannot fail. An error can only come from a `Display` that gave up, and
    // what it wrote before is printed.
    let _ = port.write_fmt(line);
    send(b'\n');
}

fn send(byte: u8) {
    while read_register(5) & TRANSMIT_EMPTY == 0 {
        core::hint::spin_loop();
    }
    write_register(0, byte);
}

fn read_register(register: u16) -> u8 {
    // SAFETY: a register of the serial port; reading the line status changes nothing that memory
    // safety depends on.
    unsafe { Port::new(BASE + register).read() }
}

fn write_register(register: u16, value: u8) {
    // SAFETY: a register of the serial port, whose interrupts stay off; it touches no memory.
    unsafe { Port::new(BASE + register).write(value) }
}
