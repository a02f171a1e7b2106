//! Netlink: sends requests to the kernel and reads the answer, which is a list (dump) or an acknowledgement.

use std::{fmt::Debug, io};

use netlink_packet_core::{NetlinkDeserializable, NetlinkMessage, NetlinkPayload, NetlinkSerializable};
use netlink_sys::{Socket, SocketAddr};

/// Size of the receive buffer in bytes. The kernel makes the datagrams of a dump at most 32 KiB.
const BUFFER: usize = 64 * 1024;

/// Opens a netlink socket of the given protocol (such as `NETLINK_SOCK_DIAG`) and connects it to the kernel.
///
/// # Errors
///
/// Any error of socket(2), bind(2) or connect(2).
pub fn connect(protocol: isize) -> io::Result<Socket> {
    let mut socket = Socket::new(protocol)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

/// Serializes a request and sends it to the kernel.
///
/// # Errors
///
/// Any error of send(2).
pub fn send<T: NetlinkSerializable + Debug>(
    socket: &Socket,
    mut message: NetlinkMessage<T>,
) -> io::Result<()> {
    message.finalize();
    let mut buffer = vec![0; message.buffer_len()];
    message.serialize(&mut buffer);
    socket.send(&buffer, 0)?;
    Ok(())
}

/// Calls `each` for every message of an answer, up to the end of the list, or up to the acknowledgement if
/// the request is not answered with a list.
///
/// # Errors
///
/// The error that the kernel answered with, any error of recv(2), or an answer that cannot be parsed.
pub fn receive<T: NetlinkDeserializable + Debug>(socket: &Socket, mut each: impl FnMut(T)) -> io::Result<()> {
    let mut buffer = Vec::with_capacity(BUFFER);
    loop {
        // netlink-sys takes a `BufMut` and fills its free space.
        buffer.clear();
        socket.recv(&mut buffer, 0)?;
        let mut rest = &buffer[..];
        while !rest.is_empty() {
            let message = NetlinkMessage::<T>::deserialize(rest).map_err(io::Error::other)?;
            let length = (message.header.length as usize).next_multiple_of(4);
            match message.payload {
                NetlinkPayload::InnerMessage(inner) => each(inner),
                // If no kernel module serves the protocol, the error comes at the end of an empty list.
                NetlinkPayload::Done(done) if done.code < 0 => {
                    return Err(io::Error::from_raw_os_error(-done.code));
                }
                NetlinkPayload::Done(_) => return Ok(()),
                NetlinkPayload::Error(error) if error.code.is_none() => return Ok(()),
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                _ => {}
            }
            rest = rest.get(length..).unwrap_or_default();
        }
    }
}
