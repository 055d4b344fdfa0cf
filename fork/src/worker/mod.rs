//! One VM in a process of its own.

mod packet;
